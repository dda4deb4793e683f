"""Arguments of the optimisers, read once at the door."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError

_RANGES = {
    "lr": "a number >= 0",
    "momentum": "a number in [0, 1)",
    "weight_decay": "a number >= 0",
    "damping": "a number >= 0",
}


def check_model(model: object) -> None:
    """Refuse what is not a module with something to train."""
    if not isinstance(model, nn.Module):
        raise ProblemError(
            f"model is {type(model).__name__}; expected the nn.Module that is trained, not its parameters: "
            "SNOpt(model, lr=0.01)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProblemError("the model has no trainable parameter; expected one or more with requires_grad=True")


def check_choice(what: str, value: object, options: Sequence[str]) -> None:
    """Refuse a word that is not one of the options."""
    if value not in options:
        offered = " or ".join(map(repr, options))
        raise ProblemError(f"{what} is {value!r}; expected {offered}{nearest(str(value), options)}")


def check_count(what: str, value: object, default: int) -> None:
    """Refuse what is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProblemError(f"{what} is {value!r}; expected a whole number of at least 1, {default} by default")


def check_number(what: str, value: object, expected: str, below: float = math.inf, above: float = 0.0) -> None:
    """Refuse what is not a number in ``[above, below)``."""
    if not (isinstance(value, int | float) and above <= value < below):
        raise ProblemError(f"{what} is {value!r}; expected {expected}")


def check_options(group: Mapping[str, Any]) -> None:
    """Refuse options of a parameter group that are out of range."""
    for name, expected in _RANGES.items():
        check_number(name, group[name], expected, below=1.0 if name == "momentum" else math.inf)


def listed(names: Sequence[str]) -> str:
    """At most eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
