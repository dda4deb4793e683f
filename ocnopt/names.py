"""What the user calls states, controls and constraints, units included: for plots, tables and messages."""

from collections.abc import Sequence
from typing import Any

from ocnopt.errors import ProblemError


def read_names(what: str, value: Any, size: int | None = None) -> tuple[str, ...] | None:
    """Read names such as ``("angle [rad]", "rate [rad/s]")``; None stays None.

    Args:
        what: the argument they came as.
        value: the user's.
        size: how many there must be, where that is known.

    Raises:
        ProblemError: no sequence of strings, another number of them, or one twice.
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ProblemError(f"{what} is {value!r}; expected a tuple of strings, one for each entry: ('angle [rad]', ..)")
    if size is not None and len(value) != size:
        raise ProblemError(f"{what} has {len(value)} names; expected {size}, one for each entry")
    twice = next((name for i, name in enumerate(value) if name in value[:i]), None)
    if twice is not None:
        raise ProblemError(f"{what} has {twice!r} twice; expected different names: number them")
    return tuple(value)
