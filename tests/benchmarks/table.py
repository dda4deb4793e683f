"""What the parts print with, and what the command line says besides their names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# rich would take what stands in brackets for its own
ABSENT = escape("not installed (pip install 'ocnopt[peers]')")
console = Console(width=max(120, Console().width))  # or the tables break where the output is piped


class Options(NamedTuple):
    """What the command line says besides the parts."""

    quick: bool = False
    full: bool = False
    against: Path | None = None
    kept: Path | None = None


def most(limit: float | None) -> str:
    """A wanted upper limit."""
    return "" if limit is None else f"<= {limit:.3g}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print one table."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
