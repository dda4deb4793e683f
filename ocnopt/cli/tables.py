"""One table, shown on the terminal and in the page alike; messages and results as the command line says them."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

BREAK = "\n"
# names of options that are no words of a sentence: an option wherever they stand; the others only before = and "is"
_LONG = "max_iterations|horizon_lr|horizon_penalty|batch_size|checkpoint_every"
_OPTIONS = f"{_LONG}|solver|steps|integrator|tolerance|optimizer|horizon|lr|epochs|iterations|seed|nproc"


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; the first column is left-aligned, the others right-aligned.

    Args:
        title: one line.
        head: one text a column; it may hold line breaks.
        rows: as many texts each.
        note: what a reader must know to read the figures; it may hold line breaks.
        text: whether all columns are left-aligned.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: bool = False


def as_options(message: str) -> str:
    """A message of the library with the options of the command line instead of the arguments of Python.

    Args:
        message: of an error or a status.

    Example:
        >>> as_options("no constraints here; use solver='casadi', or raise max_iterations")
        'no constraints here; use --solver casadi, or raise --max-iterations'
    """

    def option(match: re.Match[str]) -> str:
        name, *values = match.groups()
        return " ".join([f"--{name.replace('_', '-')}", *filter(None, values)])

    message = re.sub(rf"\b({_OPTIONS})=(?:'([^']*)'|([\w.+-]*))", option, message)
    message = re.sub(rf"(?<!-)\b({_LONG})\b", option, message)
    return re.sub(rf"^({_OPTIONS})(?= is | ')", option, message)


def show(console: Console, table: Table) -> None:
    """Print a table; one of figures that is too wide for the terminal is turned, with a column for each row.

    What is too wide even so is shown the narrower way and runs over the edge: a figure that is cut is another one.

    Args:
        console: where to.
        table: what.
    """

    def needed(rich: RichTable) -> int:
        return Measurement.get(console, console.options.update(max_width=1000), rich).minimum

    rich = _rich(table)
    if not table.text and needed(rich) > console.width:
        head, *rows = zip(*([name.replace(BREAK, " ") for name in table.head], *table.rows), strict=True)
        rich = min(rich, _rich(replace(table, head=head, rows=rows)), key=needed)
    if needed(rich) > console.width:
        rich.width = needed(rich)
    console.print(rich, crop=False)


def _rich(table: Table) -> RichTable:
    rich = RichTable(
        title=Text(table.title),
        title_justify="left",
        title_style="bold",
        caption=Text(table.note) if table.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_header=any(table.head),
    )
    for i, name in enumerate(table.head):
        left = i == 0 or table.text
        folds = table.text and i == len(table.head) - 1
        # rich measures a column by its words, also one that does not wrap
        lines = BREAK.join(row[i] for row in (table.head, *table.rows)).split(BREAK)
        rich.add_column(
            Text(name),
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=not folds,
            min_width=None if folds else max(map(cell_len, lines)),
        )
    for row in table.rows:
        rich.add_row(*map(Text, row))
    return rich


def to_html(table: Table) -> str:
    """The table as HTML, without its title.

    Args:
        table: what.
    """

    def cell(text: str, tag: str) -> str:
        return f"<{tag}>{escape(text).replace(BREAK, '<br>')}</{tag}>"

    kind = ' class="text"' if table.text else ""
    head = "".join(cell(name, "th") for name in table.head) if any(table.head) else ""
    rows = "\n".join("<tr>" + "".join(cell(entry, "td") for entry in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note).replace(BREAK, "<br>")}</p>' if table.note else ""
    return f"<div class=scroll><table{kind}>\n{f'<tr>{head}</tr>' if head else ''}\n{rows}\n</table></div>{note}"


def to_markdown(table: Table) -> str:
    """The table as markdown, with its title and its note.

    Args:
        table: what.

    Example:
        >>> print(to_markdown(Table("sums", ("of", "is"), [("1 + 1", "2")], note="Exact.")))
        **sums**
        <BLANKLINE>
        | of | is |
        |---|---:|
        | 1 + 1 | 2 |
        <BLANKLINE>
        Exact.
        <BLANKLINE>
    """

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(text.replace(BREAK, ' ').replace('|', chr(92) + '|') for text in cells)} |"

    kinds = ["---", *(["---"] if table.text else ["---:"]) * (len(table.head) - 1)]
    lines = [f"**{table.title}**", "", row(table.head), f"|{'|'.join(kinds)}|", *map(row, table.rows), ""]
    return BREAK.join([*lines, *([table.note, ""] if table.note else [])])


def to_json(value: Any) -> str:
    """Plain values as JSON, which has no NaN and no infinity; null stands for them.

    Args:
        value: numbers, texts, and lists and dicts of them.

    Example:
        >>> to_json([1.5, float("nan")]).split()
        ['[', '1.5,', 'null', ']']
    """

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [finite(entry) for entry in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=2, ensure_ascii=False)
