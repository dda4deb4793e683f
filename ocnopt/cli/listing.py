"""The list of problems, as a table or as records."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ocnopt.cli.tables import Table
from ocnopt.problems import ControlRecord, LearningRecord, get, names


def problem_tables(kind: str | None = None) -> list[Table]:
    """The library's problems, one table a kind.

    Args:
        kind: "control", "learning", or None for both.

    Raises:
        ProblemError: another kind.
    """
    records = [*map(get, names(kind))]
    control = [
        (r.name, f"{r.optimal_cost:.7g}", f"{r.summary} ({_sizes(r)})") for r in records if isinstance(r, ControlRecord)
    ]
    learning = [(r.name, f"{r.summary}; {r.source}") for r in records if isinstance(r, LearningRecord)]
    tables = (
        Table("", ("control problem", "best cost", "what"), control, text=True),
        Table("", ("learning problem", "what"), learning, text=True),
    )
    return [table for table in tables if table.rows]


def _sizes(record: ControlRecord) -> str:
    """Numbers of states and controls, and the end time where it is free."""
    counts = (("state", len(record.state_labels)), ("control", len(record.control_labels)))
    sizes = ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts)
    return sizes + ("" if record.T_star is None else f", best T {record.T_star:.7g}")


def problem_records(kind: str | None = None) -> list[dict[str, Any]]:
    """What ``ocnopt problems --json`` prints: the entries of a record that are None, a number, a text, or several.

    Args:
        kind: "control", "learning", or None for both.

    Raises:
        ProblemError: another kind.
    """
    kept = str | int | float | tuple | Mapping | None
    return [
        {
            field.name: dict(value) if isinstance(value, Mapping) else value
            for field in fields(record)
            if isinstance(value := getattr(record, field.name), kept)
        }
        for record in map(get, names(kind))
    ]
