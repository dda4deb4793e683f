"""A solve by a method of torchdiffeq."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import ConvergenceError
from ocnopt.integrate import fixed, torchdiffeq_bridge
from ocnopt.neural.checks import in_forward_mode
from ocnopt.neural.evaluation import Evaluation


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
    """
    if not x.numel():  # torchdiffeq's error control divides by the number of entries
        return fixed.integrate(evaluation, x, times, step_size=options["step_size"]).states
    continuous = continuous and torch.is_grad_enabled() and not in_forward_mode()
    if continuous:
        evaluation.root(times[0], x)

    def field(t: Tensor, x: Tensor) -> Tensor:
        if cap is not None and not evaluation.is_backward and evaluation.statistics.forward >= cap:
            raise ConvergenceError(
                f"method={options['method']!r} of torchdiffeq would spend more than its {cap} evaluations of the field "
                f"and stands at t = {t.item():.6g}; expected to reach the end within max_evaluations: the field "
                "has grown stiff or fast, the tolerance is too tight, or the cap too low"
            )
        return evaluation.at(t, x)

    states = torchdiffeq_bridge.integrate(
        field,
        x,
        torch.tensor(times, dtype=x.dtype, device=x.device) if moving is None else moving,
        adjoint_parameters=evaluation.parameters if continuous else None,
        **options,
    )
    evaluation.is_backward = True
    return states.unbind(0)
