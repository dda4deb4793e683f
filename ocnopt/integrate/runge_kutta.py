"""One explicit Runge-Kutta step.

x_next = x + h sum_i b_i k_i with k_i = F(t + c_i h, x + h sum_{j<i} a_ij k_j). The state x is one tensor of any shape,
h a number, or a tensor that broadcasts against x and may need gradients; the field F(t, x) returns a tensor shaped like
x. Everything that walks along a path (transcription, Neural ODEs, Runge-Kutta networks, the adjoints) takes its steps
here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.tableaus import Tableau

Time = float | Tensor
Size = float | Tensor
Field = Callable[[Time, Tensor], Tensor]


class Stages(NamedTuple):
    """What a step saw at its s stages: times t_i, points y_i and slopes k_i."""

    times: list[Time]
    points: list[Tensor]
    slopes: list[Tensor]


def combine(x: Tensor, h: Size, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + h sum_i w_i k_i, zero weights skipped."""
    if isinstance(h, Tensor):
        # one product with h, so that its gradient is one sum
        return torch.addcmul(x, h, weighted_sum(1.0, weights, slopes)) if any(weights) else x
    for weight, slope in zip(weights, slopes, strict=False):
        if weight != 0.0:
            x = torch.add(x, slope, alpha=h * weight)
    return x


def weighted_sum(h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """h sum_i w_i k_i, zero weights skipped; one weight at least is not zero."""
    total = None
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            total = slope * (h * weight) if total is None else total.add_(slope, alpha=h * weight)
    if total is None:
        raise ValueError("a sum without terms")
    return total


def stages(tableau: Tableau, field: Field, t: Time, h: Size, x: Tensor, first: Tensor | None = None) -> Stages:
    """Evaluate the field at the stages of one step; ``first`` is F(t, x) where it is known already."""
    times: list[Time] = []
    points: list[Tensor] = []
    slopes: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        times.append(t + c * h if c else t)
        points.append(combine(x, h, row, slopes))
        slopes.append(first if first is not None and not slopes else field(times[-1], points[-1]))
    return Stages(times, points, slopes)


def step(
    tableau: Tableau, field: Field, t: Time, h: Size, x: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Stages]:
    """Take one step of size h from x at time t: the next state and the stages.

    With ``first_same_as_last`` the next state is the last stage's point, its slope the ``first`` of the next step.
    """
    seen = stages(tableau, field, t, h, x, first)
    if tableau.first_same_as_last:
        return seen.points[-1], seen
    return combine(x, h, tableau.b, seen.slopes), seen


@runtime_checkable
class Take(Protocol):
    """A way to take one step: :func:`step`, or one that also keeps something of it."""

    def __call__(
        self, tableau: Tableau, field: Field, t: Time, h: float, x: Tensor, first: Tensor | None = None, /
    ) -> tuple[Tensor, Stages]:
        """As :func:`step`."""
