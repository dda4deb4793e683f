"""One table, shown on the terminal and in the report page alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

BREAK = "\n"


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; the first column is left-aligned, the others right-aligned.

    Args:
        title: one line.
        head: one text a column; it may hold line breaks.
        rows: as many texts each.
        note: what a reader must know to read the figures.
        text: whether all columns are left-aligned.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: bool = False


def show(console: Console, table: Table) -> None:
    """Print a table.

    Args:
        console: where to.
        table: what.
    """
    rich = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        caption=table.note or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_header=any(table.head),
    )
    for i, name in enumerate(table.head):
        left = i == 0 or table.text
        # heads may wrap, figures must not
        widest = None if table.text and i else max((len(row[i]) for row in table.rows), default=0)
        rich.add_column(name, justify="left" if left else "right", overflow="fold", min_width=widest)
    for row in table.rows:
        rich.add_row(*row)
    console.print(rich)


def to_html(table: Table) -> str:
    """The table as HTML, without its title.

    Args:
        table: what.
    """
    kind = ' class="text"' if table.text else ""
    head = "".join(f"<th>{escape(name).replace(BREAK, '<br>')}</th>" for name in table.head) if any(table.head) else ""
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<div class=scroll><table{kind}>\n{f'<tr>{head}</tr>' if head else ''}\n{rows}\n</table></div>{note}"
