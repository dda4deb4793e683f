"""The command line: what each command was asked, tables, and a report page."""
