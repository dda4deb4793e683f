"""A walk with error control.

After each attempted step the estimated local error e = h sum_i (b_i - b_hat_i) k_i is measured in units of the
tolerance, E = norm(e / (atol + rtol max(|x|, |x_next|))). E <= 1 accepts; either way the next length is 0.9 h
E^(-1/order), at least h/5, at most 10 h and after a rejection at most h (Hairer, Norsett and Wanner, Solving ODEs I,
II.4). The norm is taken over the whole tensor: one step size for all samples. A non-finite attempt counts as rejected,
so a step that overshoots the field's domain is tried again, shorter. What is left of an interval, where it is more than
one length and less than two, is taken in two equal steps: no sliver at the end, neither longer than it has to be.

The first length is the one at which the estimate would be 0.9^order were the field linear, with the rate |F'| / |F|
that it shows at the start; not shorter than by Hairer's rule, for paths that start at rest and for implicit methods on
stiff fields, whose fast modes the path does not follow; not longer than the state takes to move by its own size. Over
networks and classical fields dopri5 so takes 0.7 and 0.95 of the evaluations that it takes from Hairer's length at a
tolerance of 1e-3, and 0.87 and 0.97 at 1e-5.

PI control (Hairer and Wanner IV.2) was measured over networks and classical fields: it rejects fewer steps but takes
shorter ones, more evaluations on networks, and at equal error no fewer than this controller with a safety of 0.8.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ocnopt.checks import times_in_order
from ocnopt.errors import ConvergenceError, NonFiniteError, ProblemError
from ocnopt.integrate.events import Watch
from ocnopt.integrate.runge_kutta import Field, Outputs, Stages, Take, Time, closed, step, weighted_sum
from ocnopt.integrate.tableaus import DOPRI5, TABLEAUS, Tableau, error_constant
from ocnopt.integrate.walk import OnStep, Step, Walk

Norm = Callable[[Tensor], Tensor]
T = TypeVar("T", float, Tensor)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


def root_mean_square(ratio: Tensor) -> Tensor:
    """The norm of step control: the root mean square of all entries."""
    return torch.linalg.vector_norm(ratio) / math.sqrt(max(ratio.numel(), 1))


def integrate(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    tableau: Tableau = DOPRI5,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    norm: Norm = root_mean_square,
    first: Tensor | None = None,
    first_size: float | None = None,
    on_step: OnStep | None = None,
    max_evaluations: int | None = None,
    take: Take = step,
    dense: bool = False,
    watch: Watch | None = None,
) -> Walk:
    """Integrate dx/dt = F(t, x) from ``times[0]`` through ``times[1:]`` with controlled local error.

    Args:
        field: ``field(t, x)`` with t a float, shaped like x.
        x: the state at ``times[0]``, one tensor of any shape; a graph that it carries is continued through accepted
            steps.
        times: start and outputs, in either direction.
        tableau: an explicit method with an error estimate.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step.
        norm: maps the error, in units of the tolerance, to one number; what it skips takes no part in step control.
        first: F at the start, where it is known already.
        first_size: length of the first step; None estimates it, at the price of one evaluation.
        on_step: called with every accepted :class:`~ocnopt.integrate.walk.Step`.
        max_evaluations: cap on evaluations of the field.
        take: takes each step.
        dense: stop at the last time alone and interpolate the times between, by the closed method.
        watch: ends the walk where its event is met.

    Raises:
        ProblemError: the method has no error estimate, or times or tolerances make no sense.
        NonFiniteError: the field is NaN or infinite however short the step.
        ConvergenceError: the step underflows, or the cap was reached.

    >>> walk = integrate(lambda t, x: -x, torch.ones(1, dtype=torch.float64), (0.0, 1.0), rtol=1e-9, atol=1e-9)
    >>> bool(abs(walk.state[0] - math.exp(-1.0)) < 1e-8)
    True
    """
    times_in_order(times)
    if tableau.b_error is None:
        raise ProblemError(
            f"method {tableau.name!r} has no error estimate; expected one of "
            f"{', '.join(name for name, known in TABLEAUS.items() if known.b_error)}, or a fixed grid: give steps="
        )
    if not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
        raise ProblemError(f"rtol={rtol}, atol={atol}; expected two finite tolerances >= 0, not both zero")
    tableau = closed(tableau) if dense or watch is not None else tableau
    if watch is not None:
        watch.start()
    outputs = Outputs(times, tableau, dense)
    walker = _Walker(field, tableau, rtol, atol, norm, outputs, on_step, max_evaluations, take, watch)
    walker.start(times, x, first, first_size)
    for stop in outputs.stops:
        if not walker.has_met:
            walker.advance(stop)
    slope = walker.slope if tableau.first_same_as_last else None
    end = walker.t if walker.has_met else times[-1]
    return Walk(outputs.states, slope, walker.size, walker.steps, walker.rejected, walker.evaluations, end)


class _Walker:
    """Where an adaptive walk stands: t, x, F(t, x) if known, the length to try next, counts."""

    def __init__(
        self,
        field: Field,
        tableau: Tableau,
        rtol: float,
        atol: float,
        norm: Norm,
        outputs: Outputs,
        on_step: OnStep | None,
        max_evaluations: int | None,
        take: Take,
        watch: Watch | None,
    ) -> None:
        self.take, self.watch, self.has_met = take, watch, False
        self.tableau, self.norm, self._field = tableau, norm, field
        self.field = self._counted if tableau.is_solved_in_turn else field
        self.outputs, self.on_step = outputs, on_step
        self.rtol, self.atol, self.max_evaluations = rtol, atol, max_evaluations
        self.error_weights: Sequence[float] = tableau.b_error or ()
        self.steps = self.rejected = self.evaluations = 0

    def start(self, times: Sequence[float], x: Tensor, first: Tensor | None, size: float | None) -> None:
        """Stand at the first time, with a first slope and a length to try."""
        self.t, self.x, self.slope = times[0], x, first
        self.direction = math.copysign(1.0, times[1] - times[0])
        self.magnitude = x.detach().abs()
        if self.slope is None:
            self.slope = self._field(self.t, x)
            self.evaluations += 1
        span = abs(times[-1] - times[0])
        self.size = self._first_size(self.slope.detach(), span) if size is None else abs(size)

    def advance(self, end: float) -> None:
        """Step until ``end``."""
        arrived = False
        while not (arrived or self.has_met):
            remaining = abs(end - self.t)
            arrived = remaining <= self.size * (1 + 1e-6)
            # Two equal steps instead of a full one and a sliver.
            length = remaining if arrived else min(self.size, remaining / 2)
            arrived = self._attempt(length, end, arrived) and arrived

    def _attempt(self, length: float, end: float, arrives: bool) -> bool:
        """Try one step; whether it was accepted."""
        h = self.direction * length
        if not self.tableau.is_solved_in_turn:
            self._charge(len(self.tableau.c) - (self.slope is not None), h)
        x, seen = self.take(self.tableau, self.field, self.t, h, self.x, self.slope)
        error, magnitude = self._measure(h, x, seen)
        accepted = error <= 1.0
        factor = self._factor(error)
        if accepted:
            cut = None
            if self.watch is not None:
                cut = self.watch.length(self.tableau, self.field, self.t, h, self.x, seen)
            if cut is not None:
                h, arrives, self.has_met = cut, True, True
                x, seen = self.take(self.tableau, self.field, self.t, h, self.x, seen.slopes[0])
            inside = self.outputs.inside(self.t, h, arrives)
            if self.on_step is not None:
                self.on_step(Step(self.t, h, seen, inside.stop if arrives else None, x, inside))
            self.outputs.add(self.t, h, x, seen, inside, arrives)
            self.steps += 1
            self.t += h
            self.x, self.magnitude = x, magnitude
            self.slope = seen.slopes[-1] if self.tableau.first_same_as_last else None
            # A step cut short by an output says little about the length to try after it.
            self.size = max(self.size, length * factor) if arrives and factor >= 1 else length * factor
        else:
            self.rejected += 1
            self.slope = seen.slopes[0]
            self.size = length * min(factor, 1.0)
            self._refuse_underflow(error, end)
        return accepted

    def _counted(self, t: Time, x: Tensor) -> Tensor:
        """The field, where nobody knows beforehand how often a step asks it."""
        self._charge(1, 0.0 if self.steps + self.rejected == 0 else self.size)
        return self._field(t, x)

    @torch.no_grad()
    def _measure(self, h: float, x: Tensor, seen: Stages) -> tuple[float, Tensor]:
        """The error in units of the tolerance, and |x_next|."""
        error = weighted_sum(h, self.error_weights, seen.slopes)
        magnitude = x.abs()
        scale = torch.maximum(self.magnitude, magnitude).mul_(self.rtol).add_(self.atol)
        return float(self.norm(error.div_(scale))), magnitude

    def _factor(self, error: float) -> float:
        """How much longer the next step may be."""
        if not math.isfinite(error):
            return SHRINK
        if error == 0.0:
            return GROW
        return min(GROW, max(SHRINK, SAFETY * error ** (-1.0 / self.tableau.order)))

    def _charge(self, evaluations: int, h: float) -> None:
        self.evaluations += evaluations
        if self.max_evaluations is not None and self.evaluations > self.max_evaluations:
            raise ConvergenceError(spent(self.max_evaluations, f"t = {self.t:.6g}", h))

    @torch.no_grad()
    def _first_size(self, slope: Tensor, span: float) -> float:
        """The first length, from the slope and how it changes along a short Euler step.

        That step and its bounds are Hairer's (Hairer, Norsett and Wanner, II.4), but that a state at zero counts as ten
        tolerances large, and that where nothing moves the whole span is tried.
        """
        x = self.x.detach()
        scale = self.magnitude * self.rtol + self.atol
        d0, d1 = float(self.norm(x / scale)), float(self.norm(slope / scale))
        if not math.isfinite(d1):
            raise NonFiniteError(non_finite(self.t, "at the very start"))
        h0 = min(span, 0.01 * max(d0, 10.0) / max(d1, 1e-15))
        self._charge(1, h0)
        h = self.direction * h0
        bend = self._field(self.t + h, torch.add(x, slope, alpha=h)) - slope
        d2 = float(self.norm(bend / scale)) / h0
        if not math.isfinite(d2):
            return 0.01 * h0
        cautious = (0.01 / max(d1, d2, 1e-15)) ** (1.0 / self.tableau.order)
        bold = linear_length(self.tableau, max(d2 / max(d1, 1e-15), 1.0 / span), max(d1, 1e-15))
        return min(span, 100 * h0, max(cautious, bold))

    def _refuse_underflow(self, error: float, end: float) -> None:
        if self.size > 1e-13 * max(abs(self.t), abs(end)):
            return
        if not math.isfinite(error):
            raise NonFiniteError(non_finite(self.t, f"for steps down to {self.size:.1e}"))
        raise ConvergenceError(underflow(f"t = {self.t:.6g}", self.size, error, self.rtol, self.atol))


def linear_length(tableau: Tableau, rate: T, speed: T) -> T:
    """The length of a step whose estimated error is 0.9^order tolerances in a field that is linear.

    Args:
        tableau: the method.
        rate: |F'| / |F|.
        speed: |F| in units of the tolerance.
    """
    return SAFETY / rate * (rate / (error_constant(tableau) * speed)) ** (1.0 / tableau.order)


def spent(most: int, where: str, h: float) -> str:
    """The words for a walk that has spent its evaluations."""
    return (
        f"the integration would spend more than its {most} evaluations of the field and stands "
        f"at {where} with step {h:.3g}; expected to reach the end within max_evaluations: the field "
        "has grown stiff or fast (watch the evaluations beside the loss, lower the learning rate, add weight "
        "decay), the tolerance is too tight, or the cap too low"
    )


def underflow(where: str, size: float, error: float, rtol: float, atol: float) -> str:
    """The words for steps that have become too short."""
    return (
        f"underflow in dt: at {where} a step of {size:.1e} still has {error:.1e} times the error "
        f"that rtol={rtol}, atol={atol} allow; expected a smooth field: it is discontinuous, explodes in "
        "finite time or is extremely stiff there, or it is noisy (dropout under an adaptive method: use a fixed "
        "grid, steps=), or the tolerance is below the rounding of the state's dtype"
    )


def non_finite(t: float, when: str) -> str:
    """The words for a field that is NaN or infinite."""
    return (
        f"the field returned NaN or infinity near t = {t:.6g} {when}; expected finite values: check the field's "
        "parameters for NaN (a diverged optimiser: lower the learning rate, clip gradients), its input, and divisions, "
        "logarithms and roots inside it"
    )
