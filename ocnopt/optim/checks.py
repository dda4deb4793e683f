"""What the optimisers and the modules around them refuse: several processes, options of the whole, other shapes.

Groups, gradients and states have checks of their own: :mod:`ocnopt.optim.group_checks`,
:mod:`ocnopt.optim.gradient_checks`, :mod:`ocnopt.optim.state_checks`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ocnopt.checks import check_choice, check_count, check_number
from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE

DRAWN = ("sampled", "gauss_newton")  # curvatures that need backward passes of their own
CURVATURES = ("gradient", "costate", "mixed", *DRAWN)

_ONE_PROCESS = (
    "train in one process, or with SNOpt or an optimiser of torch.optim: each process would feed back over its own "
    "samples, and the copies of the model would drift apart"
)


def check_not_parallel(model: object) -> None:
    """Refuse a model for several processes."""
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                place = f"holds a DistributedDataParallel at {name!r}" if name else "is a DistributedDataParallel"
                raise ProblemError(f"the model {place}; expected one that a single process trains: {_ONE_PROCESS}")
    check_one_process()


def check_one_process() -> None:
    """Refuse to work beside other processes: a model that is wrapped later shows nowhere else."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ProblemError(
            f"torch.distributed runs {distributed.get_world_size()} processes; expected one: {_ONE_PROCESS}"
        )


def is_distributed() -> bool:
    """Whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_same_shape(name: str, key: str, came: torch.Size, expected: torch.Size) -> None:
    """Refuse a state that was made for a parameter of another shape."""
    if came != expected:
        raise ProblemError(
            f"the {key} of {name} has shape {tuple(came)}; expected {tuple(expected)}: the optimiser was made before "
            "prune(), or something else that changed shapes: make it anew"
        )


def check_fields(odes: Sequence[NeuralODE]) -> None:
    """Refuse ``everywhere=False`` where nothing would be preconditioned."""
    if not odes:
        raise ProblemError(
            "everywhere=False met a model without a NeuralODE; expected at least one, as only layers inside of "
            "them are preconditioned then: leave everywhere=True"
        )


def check_recipe(options: Mapping[str, Any]) -> None:
    """Refuse options of SNOpt as a whole that are out of range, given or loaded."""
    check_choice("curvature", options["curvature"], CURVATURES)
    check_number("power", options["power"], "a number from 0 to 1, 0.75 by default", below=math.nextafter(1.0, 2.0))
    # exp(adaptation) is a number
    check_number("adaptation", options["adaptation"], "a number >= 0 and below 100, 3 by default", below=100.0)
    if not isinstance(options["everywhere"], bool):
        raise ProblemError(f"everywhere is {options['everywhere']!r}; expected True or False")
    check_count("refresh_every", options["refresh_every"], default=10)
    check_choice("length", options["length"], ("noise", "division"))
    check_choice("reduction", options["reduction"], ("mean", "sum"))
