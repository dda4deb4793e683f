"""What a user hands to SNOpt's ``sample``: refused here."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import check_choice, check_count
from ocnopt.differential.kronecker import Collector
from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.checks import DRAWN, is_distributed

LIKELIHOODS = ("categorical", "gaussian")


def check_drawn(curvature: str, *, any_drawn: bool) -> None:
    """Refuse a step whose curvature has not been sampled."""
    if not any_drawn and curvature in DRAWN:
        raise ProblemError(
            f"curvature={curvature!r} met a step without sample(); expected optimizer.sample(outputs, likelihood) "
            "between the forward and the backward pass of every iteration, or another curvature"
        )


def check_drawable(curvature: str) -> None:
    """Refuse curvatures that need passes of their own beside other processes."""
    if curvature in DRAWN and is_distributed() and torch.distributed.get_world_size() > 1:
        raise ProblemError(
            f"curvature={curvature!r} met several processes, whose DistributedDataParallel takes one backward pass a "
            'forward pass; expected "gradient", "costate" or "mixed" there'
        )


def check_draws(
    curvature: str, outputs: Any, likelihood: Any, draws: Any, odes: Iterable[NeuralODE], collector: Collector
) -> None:
    """Refuse what no column can be made for."""
    if curvature not in DRAWN:
        raise ProblemError(
            f"sample() met curvature={curvature!r}, which takes nothing from it; expected one of {', '.join(DRAWN)}: "
            "leave the call out, or choose such a curvature"
        )
    check_drawable(curvature)
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_count("draws", draws, default=1)
    is_tensor = isinstance(outputs, Tensor)
    if not is_tensor or not outputs.requires_grad or outputs.ndim < 2:
        came = type(outputs).__name__ if not is_tensor else f"a tensor of shape {tuple(outputs.shape)}"
        raise ProblemError(
            f"outputs are {came}{' without a graph' if is_tensor and not outputs.requires_grad else ''}; expected what "
            f"the model returned for a batch, (B, ..., C): optimizer.sample(outputs, {likelihood!r}) before "
            "loss.backward()"
        )
    if curvature == "gauss_newton" and likelihood == "categorical" and outputs.ndim > 2:
        raise ProblemError(
            f"outputs have shape {tuple(outputs.shape)}: several labels a sample, whose columns would be as many as "
            'places times classes; expected (B, C): use curvature="sampled", which draws a label at every place'
        )
    if any(observer is not collector for ode in odes for observer in ode.observers):
        raise ProblemError(
            f"curvature={curvature!r} met a NeuralODE that something else observes, as a HorizonPolicy does, which "
            'would take its passes for those of the loss; expected "gradient", "costate" or "mixed" beside it'
        )
