"""One Runge-Kutta step; explicit here, implicit in :mod:`ocnopt.integrate.stiff`.

x_next = x + h sum_i b_i k_i with k_i = F(t + c_i h, x + h sum_{j<i} a_ij k_j). The state x is one tensor of any shape,
h a number, or a tensor that broadcasts against x and may need gradients; the field F(t, x) returns a tensor shaped like
x. Everything that walks along a path (transcription, Neural ODEs, Runge-Kutta networks, the adjoints) takes its steps
here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.stiff import solve_stages
from ocnopt.integrate.tableaus import Groups, Tableau

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
    for c, row, groups in zip(tableau.c, tableau.a, tableau.groups, strict=False):
        times.append(t + c * h if c else t)
        points.append(combine(x, h, row, slopes) if isinstance(h, Tensor) else _moved(x, h, groups, slopes))
        slopes.append(field(times[-1], points[-1]) if first is None or slopes else first)
    return Stages(times, points, slopes)


def step(
    tableau: Tableau, field: Field, t: Time, h: Size, x: Tensor, first: Tensor | None = None, inner: Field | None = None
) -> tuple[Tensor, Stages]:
    """Take one step of size h from x at time t: the next state and the stages.

    With ``first_same_as_last`` the next state is the last stage's point, its slope the ``first`` of the next step. An
    implicit method may be given the field of its Newton iterations apart, as ``inner``.
    """
    if tableau.is_solved_in_turn:
        seen = Stages(*solve_stages(tableau, field, t, h, x, first, inner))
        return seen.points[-1], seen
    seen = stages(tableau, field, t, h, x, first)
    if tableau.first_same_as_last:
        return seen.points[-1], seen
    if isinstance(h, Tensor):
        return combine(x, h, tableau.b, seen.slopes), seen
    return _moved(x, h, tableau.groups[-1], seen.slopes), seen


def _moved(x: Tensor, h: float, groups: Groups, slopes: Sequence[Tensor]) -> Tensor:
    """x + h sum_i w_i k_i; slopes of one weight are summed first, so that they share a product on the way back."""
    is_half = x.element_size() < 4  # whose sums may overflow before they are scaled
    for weight, first, others in groups:
        slope = slopes[first]
        for other in others:
            if is_half:
                x = torch.add(x, slopes[other], alpha=h * weight)
            else:
                slope = slope + slopes[other]
        x = torch.add(x, slope, alpha=h * weight)
    return x


@cache
def closed(tableau: Tableau) -> Tableau:
    """The method with F(t + h, x_next) as its last stage, which is the first of the next step too."""
    if tableau.first_same_as_last:
        return tableau
    return replace(
        tableau,
        c=(*tableau.c, 1.0),
        a=(*tableau.a, tableau.b),
        b=(*tableau.b, 0.0),
        quadrature=(*tableau.quadrature, 0.0),
        b_error=tableau.b_error and (*tableau.b_error, 0.0),
        first_same_as_last=True,
    )


def interpolate(tableau: Tableau, h: float, x: Tensor, slopes: Sequence[Tensor], theta: Tensor) -> Tensor:
    """The states ``(m, *x.shape)`` at t + theta h within a step of a closed method from x.

    Args:
        tableau: closed.
        h: size of the step.
        x: the state at its start.
        slopes: those of its stages.
        theta: ``(m,)``, float64, from 0 to 1.
    """
    powers = theta[:, None] ** torch.arange(1, len(_polynomials(tableau)[0]) + 1, device=theta.device)
    weights = (h * powers @ torch.tensor(_polynomials(tableau), dtype=theta.dtype, device=theta.device).T).to(x)
    states = x
    for weight, slope in zip(weights.unbind(1), slopes, strict=True):
        states = torch.addcmul(states, weight.view(-1, *(1,) * x.ndim), slope)
    return states


@cache
def _polynomials(tableau: Tableau) -> tuple[tuple[float, ...], ...]:
    """The coefficients of theta, theta^2, ... in each b_i(theta)."""
    rows, last = [], len(tableau.b) - 1
    for i, b in enumerate(tableau.b):
        high = () if tableau.dense is None else tableau.dense[i]
        start, end = float(i == 0), float(i == last)
        value = b - start - sum(high)
        cubic = end - start - sum(k * a for k, a in enumerate(high, start=4)) - 2 * value
        rows.append((start, value - cubic, cubic, *high))
    return tuple(rows)


class Outputs:
    """The states at the output times of a walk, gathered step by step.

    Args:
        times: start and outputs.
        tableau: the method; closed if the walk is dense.
        dense: whether the walk stops at the last time alone; the others are interpolated.
    """

    def __init__(self, times: Sequence[float], tableau: Tableau, dense: bool) -> None:
        self._times, self._tableau, self._dense = times, tableau, dense
        self.stops = times[-1:] if dense else times[1:]
        self.states: list[Tensor] = []

    def inside(self, t: float, h: float, arrived: bool) -> range:
        """The outputs before the end of a step, where the walk has perhaps ``arrived`` at a stop."""
        first = last = len(self.states) + 1
        while self._dense and last < len(self._times) - 1 and (arrived or (self._times[last] - t) / h < 1.0):
            last += 1
        return range(first, last)

    def add(self, t: float, h: float, x: Tensor, seen: Stages, inside: range, arrived: bool) -> None:
        """Take in a step that ends in x."""
        if inside:
            theta = torch.tensor([(self._times[i] - t) / h for i in inside], dtype=torch.float64, device=x.device)
            # Where the slopes have a graph it goes on, whatever the mode.
            with torch.set_grad_enabled(any(slope.requires_grad for slope in seen.slopes)):
                self.states += interpolate(self._tableau, h, seen.points[0], seen.slopes, theta).unbind()
        if arrived:
            self.states.append(x)


@runtime_checkable
class Take(Protocol):
    """A way to take one step: :func:`step`, or one that also keeps something of it."""

    def __call__(
        self, tableau: Tableau, field: Field, t: Time, h: float, x: Tensor, first: Tensor | None = None, /
    ) -> tuple[Tensor, Stages]:
        """As :func:`step`."""
