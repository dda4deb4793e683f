"""The data sets that are downloaded on request: which there are, and fetching one."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ocnopt.cli.tables import Table
from ocnopt.errors import ProblemError
from ocnopt.problems.learning.fetch import DATA_SETS, fetch
from ocnopt.problems.learning.files import data_folder


def data_table() -> Table:
    """Each data set with what it is, and whether it is there."""
    rows = [(name, "no" if dataset.missing() else "yes", dataset.summary) for name, dataset in DATA_SETS.items()]
    return Table(f"in {data_folder()}", ("data set", "there", "what"), rows, text=True)


def run_fetch(action: str, name: str | None, console: Console) -> None:
    """Download a data set with a bar for each file.

    Args:
        action: "fetch".
        name: of a data set.
        console: where to draw.

    Raises:
        ProblemError: another action, or no name.
        DataError: the download failed, or is not what was expected.
    """
    if action != "fetch" or name is None:
        raise ProblemError(
            f"ocnopt data met {' '.join(filter(None, (action, name)))!r}; expected 'ocnopt data' or 'ocnopt data fetch "
            f"NAME' with one of {', '.join(DATA_SETS)}"
        )
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        tasks = {}

        def report(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file)
            bar.update(tasks[file], completed=done, total=total or None)

        found = [*fetch(name, report)]
    for path, known in found:
        console.print(f"{path}: {known}", markup=False, highlight=False, soft_wrap=True)
