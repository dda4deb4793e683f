"""The command line: run folders, a training loop, tables, plots and a report page."""
