r"""Full-batch gradient descent whose step length is found by backtracking.

With the gradient g at p, a step goes to p+ = p - s g/L and is taken where the quadratic model of curvature L bounds the
loss,  J(p+) <= J(p) + <g, d> + L/2 <d, d/s>,  d = p+ - p;  else L is doubled. After a step that is taken L shrinks. The
scales s, one for each parameter tensor, are 1 unless their units differ. A parameter that its module projects when it
is read (the simplex of :class:`ocnopt.neural.runge_kutta_net.RungeKuttaNet`) is stepped and projected as in the
forward-backward method, since d is measured behind the projection.

Source: Benning et al., arXiv 1904.05657, algorithm 1; Beck and Teboulle, SIAM J. Imaging Sci. 2 (2009).
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import check_count
from ocnopt.errors import NonFiniteError, ProblemError

GROW, SHRINK, STEEPEST = 2.0, 0.9, 1e20


class Descent(NamedTuple):
    """The loss before each iteration and after the last, and 1/L at the end."""

    losses: list[float]
    step: float


def descend(
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    iterations: int,
    *,
    step: float = 1.0,
    scales: Sequence[float] | None = None,
    on_step: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Descent:
    """Lower a loss by gradient descent with backtracking.

    Args:
        parameters: what is changed, in place.
        loss: the loss of all samples, a number with a graph; the same function at every call.
        iterations: steps to take; fewer where no step lowers the loss any more.
        step: 1/L of the first trial.
        scales: s > 0 of each parameter, the square of the size of change that matters in it; 1 if None.
        on_step: called after each step with its number, from 1, and the loss there.

    Raises:
        ProblemError: iterations, step or scales out of range, or nothing to change.
        NonFiniteError: the first loss is NaN or infinite.

    >>> x = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> losses, step = descend([x], lambda: 0.5 * (x**2).sum(), 1, step=8.0)
    >>> losses, step, x.tolist()
    ([5.0, 0.0], 1.1..., [0.0, 0.0])
    """
    check_count("iterations", iterations, 10_000)
    if not 0 < step < inf:
        raise ProblemError(f"step is {step!r}; expected a positive number, 1/L of the first trial")
    given = [*parameters]
    scales = [1.0] * len(given) if scales is None else scales
    if len(scales) != len(given) or not all(0 < s < inf for s in scales):
        raise ProblemError(f"scales are {scales}; expected {len(given)} positive numbers, one for each parameter")
    if not any(p.requires_grad for p in given):
        raise ProblemError("no parameter requires gradients; expected one at least: call requires_grad_(True) on them")
    moved, s = zip(*((p, s) for p, s in zip(given, scales, strict=True) if p.requires_grad), strict=True)
    L, (value, g) = 1.0 / step, _first(moved, loss)
    losses = [value]
    for iteration in range(1, iterations + 1):
        start = [p.detach().clone() for p in moved]
        while True:
            _put(moved, [p0 - gp * (sp / L) for p0, gp, sp in zip(start, g, s, strict=True)])
            trial = loss()
            d = [p.detach() - p0 for p, p0 in zip(moved, start, strict=True)]
            if L > STEEPEST or not any(bool(dp.any()) for dp in d):
                _put(moved, start)
                return Descent(losses, 1.0 / L)
            if float(trial.detach()) <= min(value, _model(value, L, g, s, d)):
                break
            L *= GROW
        value, g, L = float(trial.detach()), torch.autograd.grad(trial, moved), SHRINK * L
        losses.append(value)
        on_step(iteration, value)
    return Descent(losses, 1.0 / L)


@torch.no_grad()
def _put(moved: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, v in zip(moved, values, strict=True):
        p.copy_(v)


def _first(moved: Sequence[Tensor], loss: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    value = loss()
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"the first loss is {float(value.detach())}; expected a finite number: look at the inputs and the weights"
        )
    return float(value.detach()), torch.autograd.grad(value, moved)


def _model(value: float, L: float, g: Sequence[Tensor], s: Sequence[float], d: Sequence[Tensor]) -> float:
    """J + <g, d> + L/2 <d, d/s>."""
    parts = [(gp * dp).sum() + (0.5 * L / sp) * (dp * dp).sum() for gp, sp, dp in zip(g, s, d, strict=True)]
    return value + float(torch.stack(parts).sum())
