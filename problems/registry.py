"""Every problem of the library by name.

>>> from ocnopt import problems
>>> problems.control("scalar_lqr").optimal_cost
0.7615941559557649
"""

from collections.abc import Mapping
from types import MappingProxyType

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError
from ocnopt.problems.classical import CONTROL_RECORDS
from ocnopt.problems.learning import LEARNING_RECORDS
from ocnopt.problems.record import ControlRecord, LearningRecord, Record

_ALL: tuple[Record, ...] = (*CONTROL_RECORDS, *LEARNING_RECORDS)
RECORDS: Mapping[str, Record] = MappingProxyType({record.name: record for record in _ALL})


def names(kind: str | None = None) -> tuple[str, ...]:
    """Names of all problems, or of one kind.

    Args:
        kind: "control" or "learning"; none means both.

    Raises:
        ProblemError: another kind.

    Example:
        >>> names("learning")[:2]
        ('digits', 'digits_ode')
    """
    if kind not in (None, "control", "learning"):
        raise ProblemError(f"kind is {kind!r}; expected 'control' or 'learning': leave it out for all problems")
    return tuple(name for name, record in RECORDS.items() if kind in (None, record.kind))


def get(name: str) -> Record:
    """The record of a problem.

    Args:
        name: one of :func:`names`.

    Raises:
        ProblemError: no problem has this name; the message offers the nearest.
    """
    if name not in RECORDS:
        known = ", ".join(RECORDS)
        raise ProblemError(f"no problem is called {name!r}{nearest(name, RECORDS)}; expected one of: {known}")
    return RECORDS[name]


def control(name: str) -> ControlRecord:
    """The record of a control problem.

    Args:
        name: one of ``names("control")``.

    Raises:
        ProblemError: unknown, or a learning problem.
    """
    record = get(name)
    if isinstance(record, LearningRecord):
        known = ", ".join(names("control"))
        raise ProblemError(
            f"{name!r} is a learning problem; expected a control problem: train it, or choose from {known}"
        )
    return record


def learning_task(name: str) -> LearningRecord:
    """The record of a learning problem.

    Args:
        name: one of ``names("learning")``.

    Raises:
        ProblemError: unknown, or a control problem.
    """
    record = get(name)
    if isinstance(record, ControlRecord):
        known = ", ".join(names("learning"))
        raise ProblemError(
            f"{name!r} is a control problem; expected a learning problem: solve it, or choose from {known}"
        )
    return record
