"""The list of problems on the terminal."""

from rich.console import Console

from ocnopt.cli.tables import Table, show
from ocnopt.problems import control, learning_task, names


def show_problems(console: Console, kind: str | None = None) -> None:
    """Print the library's problems.

    Args:
        console: where to.
        kind: "control", "learning", or None for both.

    Raises:
        ProblemError: another kind.
    """
    listed = names(kind)
    if kind != "learning":
        records = [control(name) for name in listed if name in names("control")]
        rows = [
            (r.name, f"{r.optimal_cost:.7g}", "" if r.T_star is None else f"{r.T_star:.7g}", r.summary) for r in records
        ]
        head = ("control problem", "best cost", "best T", "what")
        show(console, Table("", head, rows, text=True))
    if kind != "control":
        tasks = [learning_task(name) for name in listed if name in names("learning")]
        learn = [(t.name, f"{t.summary}; {t.source}") for t in tasks]
        show(console, Table("", ("learning problem", "what"), learn, text=True))
