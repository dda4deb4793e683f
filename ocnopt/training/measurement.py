"""A study that measures instead of racing: lines of figures for each seed, and what is read off them.

Its folder:

    <folder>/metrics.jsonl      the lines of all seeds
    <folder>/checkpoint.pt      how many seeds are done; a study that was killed goes on with the next
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ocnopt.runs import RunFolder

Line = Mapping[str, Any]
Lines = Sequence[Line]


class Sheet(NamedTuple):
    """A table: its title, column heads, rows of text, and what a reader must know."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Drawn(NamedTuple):
    """A figure, the name of its file and its caption."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how it is shown.

    Args:
        name: in the registry, beside those of :class:`ocnopt.training.study.Study`.
        summary: one line for a table.
        problem: name of the learning problem whose data and model are used.
        measure: ``measure(seed, quick)`` yields lines of plain JSON values, a few of them where it is to be quick.
        sheets: the tables of the lines of all seeds.
        draw: their figures.
        says: one sentence on what they show.
        seeds: 0, 1, ... up to this number of them.
    """

    name: str
    summary: str
    problem: str
    measure: Callable[[int, bool], Iterator[Line]]
    sheets: Callable[[Lines], list[Sheet]]
    draw: Callable[[Lines], list[Drawn]]
    says: Callable[[Lines], str]
    seeds: int = 3


def run_measurement(
    asked: Measurement,
    folder: RunFolder,
    *,
    seeds: int,
    quick: bool,
    on_line: Callable[[Line], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure what is left to measure.

    Args:
        asked: what to measure.
        folder: takes the lines.
        seeds: how many.
        quick: whether the small size is wanted.
        on_line: called with each new line.

    Returns:
        The lines of all seeds, each with its ``seed``.
    """
    done = (folder.load_checkpoint() or {}).get("seeds", 0)
    lines = folder.keep_metrics(done - 1, "seed")  # a seed that a kill cut short is measured again
    for seed in range(done, seeds):
        for figures in asked.measure(seed, quick):
            line = {"seed": seed, **figures}
            folder.log(line)
            lines.append(line)
            on_line(line)
        folder.save_checkpoint({"seeds": seed + 1})
    return lines


def chosen(lines: Lines, **wanted: Any) -> list[Line]:
    """The lines that have all of these values.

    Args:
        lines: of a measurement.
        wanted: key -> value.
    """
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def distinct(lines: Lines, key: str) -> list[Any]:
    """The values of a key, in the order in which they come.

    Args:
        lines: of a measurement.
        key: of each line.
    """
    return list(dict.fromkeys(line[key] for line in lines if key in line))


def middle(lines: Lines, key: str, **wanted: Any) -> float | None:
    """The median of a figure over the seeds; None where nothing was measured.

    Args:
        lines: of a measurement.
        key: of the figure.
        wanted: which lines count.

    Example:
        >>> lines = [{"seed": seed, "way": "a", "error": error} for seed, error in enumerate([3.0, 1.0, 2.0])]
        >>> middle(lines, "error", way="a"), middle(lines, "error", way="b")
        (2.0, None)
    """
    values = [line[key] for line in chosen(lines, **wanted) if line.get(key) is not None]
    return float(median(values)) if values else None


def cell(value: float | None, form: str = ".3g") -> str:
    """A figure as a table shows it.

    Args:
        value: the figure; None where there is none.
        form: of ``format``.
    """
    return "-" if value is None else format(value, form)
