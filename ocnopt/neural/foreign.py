"""A solve by a method of torchdiffeq."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.integrate import fixed, torchdiffeq_bridge
from ocnopt.neural.checks import in_forward_mode
from ocnopt.neural.evaluation import Evaluation
from ocnopt.neural.second import ONCE, Last


def solve(
    evaluation: Evaluation,
    x: Tensor,
    times: list[float],
    moving: Tensor | None,
    *,
    continuous: bool,
    cap: int | None,
    **options: Any,
) -> Sequence[Tensor]:
    """The states at ``times[1:]``.

    Args:
        evaluation: the field.
        x: the state at the start.
        times: start and outputs.
        moving: the same as a tensor, where they need gradients.
        continuous: use torchdiffeq's adjoint, if anything is differentiated.
        cap: on evaluations.
        options: method, tolerances and step size.

    Raises:
        ConvergenceError: the cap was reached.
        ProblemError: times before the last need gradients, and torchdiffeq would give those of some none.
    """
    if not x.numel():  # torchdiffeq's error control divides by the number of entries
        return fixed.integrate(evaluation, x, times, step_size=options["step_size"]).states
    continuous = continuous and torch.is_grad_enabled() and not in_forward_mode()
    if moving is not None and len(times) > 2 and not continuous and options["method"] in torchdiffeq_bridge.GRID:
        raise ProblemError(
            f"times that need gradients met method={options['method']!r}, one of torchdiffeq's on a fixed grid, whose "
            "points get no gradient there; expected detached times, a method of this library "
            '(method="rk4"), or adjoint="continuous"'
        )
    if continuous:
        evaluation.root(times[0], x)

    def field(t: Tensor, x: Tensor) -> Tensor:
        if cap is not None and not evaluation.is_backward and evaluation.statistics.forward >= cap:
            raise ConvergenceError(
                f"method={options['method']!r} of torchdiffeq would spend more than its {cap} evaluations of the field "
                f"and stands at t = {t.item():.6g}; expected to reach the end within max_evaluations: the field "
                "has grown stiff or fast, the tolerance is too tight, or the cap too low"
            )
        slope = evaluation(t, x)
        if continuous and evaluation.is_backward and slope.requires_grad:
            evaluation.require_known(slope, (t, x, *evaluation.parameters))
        return slope

    states = torchdiffeq_bridge.integrate(
        field,
        x,
        torch.tensor(times, dtype=x.dtype, device=x.device) if moving is None else moving,
        adjoint_parameters=evaluation.parameters if continuous else None,
        on_gradients=partial(_only_once, (x, *evaluation.parameters)),
        **options,
    )
    evaluation.is_backward = True
    return states.unbind(0)


def _only_once(
    inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None] | None:
    """Let the gradients of torchdiffeq's adjoint, which have no graph, refuse to be differentiated once more."""
    if not torch.is_grad_enabled():
        return None
    return Last.apply(ONCE, len(gradients), *gradients, *inputs, *cotangents)
