"""Groups of parameters and their options: read as torch reads them, or refused."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import OPTIMISER_RANGES, check_number, check_options, listed, nearest
from ocnopt.errors import ProblemError

# what a group may hold beside options: what torch and its schedulers write, and what it is called
_SCHEDULED = ("initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_AT_EACH_STEP = (*OPTIMISER_RANGES, "initial_lr")
_BESIDE_OPTIONS = frozenset(("params", "param_names", "name", "layer", *_SCHEDULED))


def read_groups(param_groups: Any) -> list[Any]:
    """Groups as a list with one of them at least, to be read by torch."""
    is_several = isinstance(param_groups, Iterable) and not isinstance(param_groups, Mapping | Tensor)
    return [*param_groups] or [{"params": []}] if is_several else [param_groups]


def add_group(optimizer: torch.optim.Optimizer, group: Any, names: Mapping[Tensor, str]) -> None:
    """Let torch read a group of parameters, and keep it if it is one of the model's, whose names are given."""
    try:
        torch.optim.Optimizer.add_param_group(optimizer, group)
    except (KeyError, TypeError) as error:
        raise not_a_group(group, error) from error
    read = optimizer.param_groups.pop()
    check_option_names(read, optimizer.defaults, type(optimizer).__name__)
    check_options(read)
    check_known(read["params"], names)
    optimizer.param_groups.append(read)


def not_a_group(group: object, error: Exception) -> ProblemError:
    """What to say where torch cannot read a group of parameters."""
    came = f"a dictionary with {[*group]}" if isinstance(group, dict) else type(group).__name__
    return ProblemError(
        f"a group of param_groups is {came}, which torch refuses ({error}); expected parameters of the model with "
        'options of their own: {"params": model.head.parameters(), "lr": 0.001}'
    )


def check_option_names(group: Mapping[str, Any], options: Collection[str], optimizer: str) -> None:
    """Refuse options that nobody would read."""
    for name in group:
        if name not in options and name not in _BESIDE_OPTIONS:
            raise ProblemError(
                f"a group of parameters has the option {name!r}; expected options of a group of {optimizer}, "
                f"{listed([*options])}{nearest(name, options)}: leave it out, or give it to the constructor"
            )


def check_written(group: Mapping[str, Any]) -> None:
    """Refuse options of a group out of range; learning rates may be 0-d tensors."""
    rates = {key: group[key] for key in ("lr", "initial_lr") if key in group}
    numbers = {key: lr.item() if isinstance(lr, Tensor) and not lr.ndim else lr for key, lr in rates.items()}
    check_options({**group, **numbers})
    if "initial_lr" in numbers:
        check_number("initial_lr", numbers["initial_lr"], OPTIMISER_RANGES["lr"])


def check_options_now(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options out of range by now, as schedulers and users write them."""
    for i, group in enumerate(groups):
        # takes a third of the time of what follows
        if all(_is_usual(group.get(name, 0.0)) for name in _AT_EACH_STEP):
            continue
        try:
            check_written(group)
        except ProblemError as error:
            raise ProblemError(
                f"{error}, in param_groups[{i}], where it was written since the optimiser was made. Parameters are as "
                "before this step: write another value there, or mend the scheduler that wrote this one"
            ) from error


def _is_usual(value: object) -> bool:
    """Whether it is in the range of every option."""
    return type(value) is float and 0.0 <= value < 1.0


def check_known(parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Refuse parameters that are not the model's."""
    for parameter in parameters:
        if parameter not in names:
            raise ProblemError(
                f"param_groups holds a tensor of shape {tuple(parameter.shape)} that is no parameter of the model; "
                "expected parameters of the model that the optimiser was given: give it the module that holds them"
            )


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups without any parameter, and complex ones."""
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.is_complex():
            raise ProblemError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; expected real ones: hold "
                "real and imaginary part in two parameters, or in one through torch.view_as_complex"
            )
    if not any(group["params"] for group in groups):
        raise ProblemError(
            "param_groups holds no parameter; expected one at least, as nothing would be trained: leave param_groups "
            "out to train the whole model"
        )
