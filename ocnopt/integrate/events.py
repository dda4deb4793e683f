"""Where a walk meets an event: g(t, x) changes its sign, and the walk ends there.

Along each accepted step g is looked at in a few points of the interpolant; where its sign has changed between two of
them, the root on the interpolant is the first guess of the length of a step that ends at the event. That step is taken,
and its length corrected, by dg/dt = g_t + g_x F and then by secants, until g is zero to rounding: the end of the path
does not depend on how exact the interpolant is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.errors import ConvergenceError, NonFiniteError, ProblemError
from ocnopt.integrate.runge_kutta import Field, Stages, interpolate, step
from ocnopt.integrate.tableaus import Tableau

Event = Callable[[Tensor, Tensor], Any]
# Looks at g in a step, corrections of its length.
_LOOKS, _MOST = 8, 12


class Rate(NamedTuple):
    """g at a place of the path, and its derivative along the path."""

    value: float
    along: float


class Met(NamedTuple):
    """Where the event was met: the time, and dx/dt and dg/dt there, of a last step of other lengths."""

    time: float
    slope: Tensor
    along: float


class Watch:
    """Watches a walk for its event.

    Args:
        event: ``g(t, x)``, one number, t a 0-d tensor.
        direction: 1 or -1 where only rising or falling values count, else 0.
        differentiated: whether the place where it is met is, which costs four steps.

    Attributes:
        met: where the walk met the event.
        last: g at the end of the last step.
    """

    def __init__(self, event: Event, direction: int = 0, *, differentiated: bool = True) -> None:
        self._event, self._direction, self._differentiated = event, direction, differentiated
        self.start()

    def start(self) -> None:
        """A walk begins."""
        self.met: Met | None = None
        self.last: float | None = None

    @torch.no_grad()
    def length(self, tableau: Tableau, field: Field, t: float, h: float, x: Tensor, seen: Stages) -> float | None:
        """The length of a step from x that ends at the event, if the one just tried, of length h, goes past it.

        Args:
            tableau: closed.
            field: the field.
            t: where the step starts.
            h: the length that was tried.
            x: the state at the start.
            seen: the stages of the step tried.
        """
        x, slopes = x.detach(), [slope.detach() for slope in seen.slopes]

        def value(theta: float) -> float:
            at = torch.tensor([theta], dtype=torch.float64, device=x.device)
            return self._value(t + theta * h, interpolate(tableau, h, x, slopes, at)[0])

        is_first = self.last is None
        before, theta = self._value(t, x) if self.last is None else self.last, 0.0
        for i in range(1, _LOOKS + 1):
            here = value(i / _LOOKS)
            if is_first and i == 1 and abs(before) <= 1e3 * torch.finfo(x.dtype).eps * abs(here):
                before = 0.0  # a path that starts at the event, but for rounding, leaves it
            if before * here <= 0 and before != 0 and (here - before) * self._direction >= 0:
                guess = _root(value, theta, i / _LOOKS, before)
                return self._corrected(tableau, field, t, h, guess * h, x, slopes[0])
            before, theta = here, i / _LOOKS
        self.last = before
        return None

    def value(self, t: float, x: Tensor) -> Tensor:
        """g as a 0-d tensor, in the current gradient mode."""
        g = self._event(x.new_full((), t), x)
        if not isinstance(g, Tensor) or g.numel() != 1 or not g.is_floating_point():
            came = type(g).__name__
            if isinstance(g, Tensor):
                came = f"a tensor of shape {tuple(g.shape)}, {g.dtype}"
            raise ProblemError(
                f"the event returned {came}; expected one real number as a tensor, whose sign changes where the path "
                "is to end: all samples end together, so reduce over them (x[..., 0].min())"
            )
        return g.reshape(())

    def _rate(self, t: float, x: Tensor, slope: Tensor) -> Rate:
        """Return g and dg/dt = g_t + g_x F."""
        with torch.enable_grad():
            time, leaf = x.new_full((), t, requires_grad=True), x.detach().requires_grad_()
            g = self._event(time, leaf).reshape(())
            if not g.requires_grad:
                raise ProblemError(
                    "the event has no derivative in t and x; expected torch operations on them all the way (no item(), "
                    "float() or detach()): the time of the event is differentiated"
                )
            found: Sequence[Tensor | None] = torch.autograd.grad(g, (time, leaf), allow_unused=True)
        g_t, g_x = found
        along = (0.0 if g_t is None else float(g_t)) + (0.0 if g_x is None else float((g_x * slope).sum()))
        if not (math.isfinite(along) and abs(along) > 0.0):
            raise ProblemError(
                f"the event does not change along the path at t = {t:.6g} (dg/dt = {along}); expected a crossing: a "
                "path that only touches the event has no derivative of the time when it does"
            )
        return Rate(float(g), along)

    def _corrected(
        self, tableau: Tableau, field: Field, t: float, h: float, length: float, x: Tensor, first: Tensor
    ) -> float:
        """The secant method on the length of the step itself, which begins with one step of Newton's.

        dg/dt at the end is not how g changes with the length of a step that is coarse.
        """
        eps = torch.finfo(x.dtype).eps
        least, last = 4 * eps * max(abs(t), abs(t + h)), math.inf
        before, growth = (length, 0.0), 0.0
        for _ in range(_MOST):
            end, seen = step(tableau, field, t, length, x, first)
            rate = self._rate(t + length, end, seen.slopes[-1])
            if abs(length - before[0]) > math.sqrt(eps) * abs(h):  # closer, the difference would be rounding
                growth = (rate.value - before[1]) / (length - before[0])
            change = rate.value / (growth or rate.along)
            before = length, rate.value
            if abs(change) <= least or last / 2 <= abs(change) <= 1e-4 * abs(h):  # rounding of g, or no more to gain
                slope = seen.slopes[-1]
                if self._differentiated:
                    slope = _by_length(tableau, field, t, h, length, x, first)
                    rate = self._rate(t + length, end, slope)
                self.met = Met(t + length, slope, rate.along)
                return length
            last = abs(change)
            # neither back beyond the start nor far past the step whose error was small
            length = min(max((length - change) / h, 0.5 * length / h), 1.25) * h
        raise ConvergenceError(
            f"the event near t = {t + length:.6g} was not met to rounding: g = {rate.value:.3g} there; expected a "
            "smooth event and field at the crossing: kinks, jumps or noise (dropout) there have no such time"
        )

    def _value(self, t: float, x: Tensor) -> float:
        value = float(self.value(t, x))
        if not math.isfinite(value):
            raise NonFiniteError(f"the event is {value} at t = {t:.6g}; expected a finite number along the whole path")
        return value


def _by_length(tableau: Tableau, field: Field, t: float, h: float, length: float, x: Tensor, first: Tensor) -> Tensor:
    """How the end of a step moves with its length, by differences of order four: F there, but for the step's error."""
    # of the step tried, as one that ends soon would leave rounding; there it is as large as what the order leaves
    delta = torch.finfo(x.dtype).eps ** 0.2 * h
    ends = {by: step(tableau, field, t, length + by * delta, x, first)[0] for by in (-2, -1, 1, 2)}
    return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * delta)


def _root(value: Callable[[float], float], low: float, high: float, before: float) -> float:
    """Where the sign changes between two places, by bisection; on an interpolant that is cheap."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) * before > 0 else (low, middle)
    return high
