"""A walk with error control of each sample by itself.

The samples are the leading axis of the state ``(B, ...)``. Each has a time t_i, a step h_i and an error norm of its
own, and is accepted or rejected alone, by the rules of :mod:`ocnopt.integrate.adaptive`; the field is evaluated on all
of them at once, at times ``(B, 1, ..., 1)`` that broadcast against the state. A sample that is rejected or has arrived
stands still. Where samples do not meet in the field, each walks as it would alone.

Every accepted step is one of all samples, h_i = 0 for those that stand still: x_i + 0 k_i = x_i, so that the adjoint
may take it again as it is.

Source: Lienen and Guennemann, torchode, arXiv 2210.12375.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.errors import ConvergenceError, NonFiniteError
from ocnopt.integrate.adaptive import GROW, SAFETY, SHRINK, linear_length, non_finite, spent, underflow
from ocnopt.integrate.runge_kutta import Field, Stages, closed, step, weighted_sum
from ocnopt.integrate.tableaus import Tableau


class SampleStep(NamedTuple):
    """One accepted step of all samples.

    Attributes:
        times: float64, ``(B, 1, ..., 1)`` as ``sizes``.
        sizes: in the dtype of the state, 0 for samples that stand still.
        stages: those of the accepted samples are right.
        state: at the end.
        interval: ``(B,)``, the output that each sample is on its way to.
        arrived: ``(B,)``, which of them arrive there; None where none does.
    """

    times: Tensor
    sizes: Tensor
    stages: Stages
    state: Tensor
    interval: Tensor
    arrived: Tensor | None


class SampleWalk(NamedTuple):
    """A finished walk: the states at the outputs, F at the end, steps taken and rejected ``(B,)``."""

    states: list[Tensor]
    slope: Tensor
    steps: Tensor
    rejected: Tensor


def column(values: Tensor, x: Tensor) -> Tensor:
    """Numbers of the samples ``(B,)`` as ``(B, 1, ..., 1)``, which broadcasts against their states."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def integrate(
    field: Field,
    x: Tensor,
    times: Tensor,
    *,
    tableau: Tableau,
    rtol: float,
    atol: float,
    first: Tensor | None = None,
    on_step: Callable[[SampleStep], None] | None = None,
    max_evaluations: int | None = None,
) -> SampleWalk:
    """Integrate dx/dt = F(t, x), sample i from ``times[0, i]`` through ``times[1:, i]``.

    Args:
        field: ``field(t, x)`` with t float64 ``(B, 1, ..., 1)``, shaped like x.
        x: ``(B, ...)``, the states at the start; a graph that it carries is continued through accepted steps.
        times: start and outputs, float64 ``(1 + K, B)``, all in one direction; equal ones may follow each other.
        tableau: an explicit method with an error estimate.
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step.
        first: F at the start, where it is known already.
        on_step: called with every step that at least one sample accepts.
        max_evaluations: cap on evaluations of the field, each on all samples.

    Raises:
        NonFiniteError: the field of a sample is NaN or infinite however short the step.
        ConvergenceError: a step underflows, or the cap was reached.

    >>> x, ends = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    >>> from ocnopt.integrate.tableaus import DOPRI5
    >>> walk = integrate(lambda t, x: -x, x, ends, tableau=DOPRI5, rtol=1e-9, atol=1e-9)
    >>> [round(float(end), 8) == round(math.exp(-T), 8) for end, T in zip(walk.states[0], (1.0, 2.0))]
    [True, True]
    """
    if not x.numel():
        none = torch.zeros_like(times[0], dtype=torch.long)
        return SampleWalk([x.clone() for _ in times[1:]], x, none, none)
    walker = _Walker(field, closed(tableau), rtol, atol, max_evaluations, times)
    walker.start(x, first)
    while not walker.attempt(on_step):
        pass
    return SampleWalk(walker.outputs, walker.slope, walker.steps, walker.rejected)


class _Walker:
    """Where the samples stand: t, x, F(t, x), the lengths to try next, the outputs that they are on their way to."""

    def __init__(
        self, field: Field, tableau: Tableau, rtol: float, atol: float, most: int | None, times: Tensor
    ) -> None:
        self.field, self.tableau, self.rtol, self.atol, self.most = field, tableau, rtol, atol, most
        self.times, self.evaluations = times, 0
        self.direction = -1.0 if bool((times[-1] < times[0]).any()) else 1.0

    def start(self, x: Tensor, first: Tensor | None) -> None:
        """Stand at the first times, with first slopes and lengths to try."""
        self.t, self.x, self.outputs = self.times[0], x, [x] * (len(self.times) - 1)
        self.place = torch.ones_like(self.t, dtype=torch.long)
        self.steps = self.rejected = torch.zeros_like(self.place)
        self.evaluations += first is None
        self.slope = self.field(column(self.t, x), x) if first is None else first
        self.magnitude, self.size = x.detach().abs(), torch.zeros_like(self.t)
        self.size = self._first_size((self.times[-1] - self.t).abs())

    def attempt(self, on_step: Callable[[SampleStep], None] | None) -> bool:
        """Try one step of every sample; whether all of them have arrived at their last outputs."""
        last = len(self.times) - 1
        target = self.times.gather(0, self.place.clamp(max=last)[None])[0]
        remaining = (target - self.t).abs()
        arrives = remaining <= self.size * (1 + 1e-6)
        # Two equal steps instead of a full one and a sliver.
        length = torch.where(arrives, remaining, torch.minimum(self.size, remaining / 2))
        self._charge(len(self.tableau.c) - 1)
        t, h = column(self.t, self.x), column(self.direction * length, self.x).to(self.x.dtype)
        x, seen = step(self.tableau, self.field, t, h, self.x, self.slope)
        error, magnitude = self._measure(h, x, seen)
        moving = self.place <= last
        accepted, arrived = moving & (error <= 1.0), moving & arrives & (error <= 1.0)
        kept = column(accepted, x)
        h = torch.where(kept, h, torch.zeros_like(h))
        any_rejected, any_accepted, any_arrived = torch.stack(
            [(moving & ~accepted).any(), accepted.any(), arrived.any()]
        ).tolist()
        if any_accepted and any_rejected and x.requires_grad:
            # What a rejected attempt met (NaN) must not reach the gradient.
            self._charge(len(self.tableau.c) - 1)
            x, seen = step(self.tableau, self.field, t, h, self.x, self.slope)
        if any_accepted:
            self.slope = torch.where(kept, seen.slopes[-1], seen.slopes[0])
            x = torch.where(kept, x, self.x)
            if on_step is not None:
                on_step(SampleStep(t, h, seen, x, self.place.clamp(max=last), arrived if any_arrived else None))
            self.x, self.magnitude = x, torch.where(kept, magnitude, self.magnitude)
            self.t = torch.where(arrived, target, self.t + self.direction * length * accepted)
            self.steps = self.steps + accepted
        if any_arrived:
            self._report(arrived)
        self._resize(length, error, accepted, arrives)
        if any_rejected:
            self.rejected = self.rejected + (moving & ~accepted)
            self._refuse_underflow(moving & ~accepted, error)
        return any_arrived and bool((self.place > last).all())

    def _report(self, arrived: Tensor) -> None:
        for place in self.place[arrived].unique().tolist():
            here = column(arrived & (self.place == place), self.x)
            self.outputs[place - 1] = torch.where(here, self.x, self.outputs[place - 1])
        self.place = self.place + arrived

    @torch.no_grad()
    def _measure(self, h: Tensor, x: Tensor, seen: Stages) -> tuple[Tensor, Tensor]:
        """The error of each sample in units of the tolerance ``(B,)``, and |x_next|."""
        error = h * weighted_sum(1.0, self.tableau.b_error or (), [slope.detach() for slope in seen.slopes])
        magnitude = x.detach().abs()
        scale = torch.maximum(self.magnitude, magnitude).mul_(self.rtol).add_(self.atol)
        return _norm(error.div_(scale)), magnitude

    def _resize(self, length: Tensor, error: Tensor, accepted: Tensor, arrives: Tensor) -> None:
        factor = (SAFETY * error ** (-1.0 / self.tableau.order)).clamp(SHRINK, GROW)
        factor = torch.where(error.isfinite(), factor, SHRINK)
        after = length * torch.where(accepted, factor, factor.clamp(max=1.0))
        # A step cut short by an output says little about the length to try after it.
        self.size = torch.where(accepted & arrives & (factor >= 1), torch.maximum(self.size, after), after)

    def _charge(self, evaluations: int) -> None:
        self.evaluations += evaluations
        if self.most is not None and self.evaluations > self.most:
            slowest = int((self.times[-1] - self.t).abs().argmax())
            where = f"t = {float(self.t[slowest]):.6g} (sample {slowest})"
            raise ConvergenceError(spent(self.most, where, self.direction * float(self.size[slowest])))

    @torch.no_grad()
    def _first_size(self, span: Tensor) -> Tensor:
        """As :mod:`ocnopt.integrate.adaptive` begins."""
        x, slope = self.x.detach(), self.slope.detach()
        scale = self.magnitude * self.rtol + self.atol
        d0, d1 = _norm(x / scale), _norm(slope / scale)
        if not bool(d1.isfinite().all()):
            sample = int((~d1.isfinite()).nonzero()[0])
            raise NonFiniteError(non_finite(float(self.t[sample]), f"of sample {sample} at the very start"))
        h0 = torch.minimum(span, 0.01 * d0.clamp(min=10.0) / d1.clamp(min=1e-15))
        self._charge(1)
        h = column(self.direction * h0, x)
        bend = self.field(column(self.t, x) + h, torch.addcmul(x, h.to(x.dtype), slope)) - slope
        d2 = _norm(bend / scale) / h0
        d1 = d1.clamp(min=1e-15)
        cautious = (0.01 / torch.maximum(d1, d2)) ** (1.0 / self.tableau.order)
        bold = linear_length(self.tableau, torch.maximum(d2 / d1, 1.0 / span), d1)
        longest = torch.minimum(span, 100 * h0)
        return torch.where(d2.isfinite(), torch.minimum(longest, torch.maximum(cautious, bold)), 0.01 * h0)

    def _refuse_underflow(self, rejected: Tensor, error: Tensor) -> None:
        ends = self.times[-1]
        stuck = rejected & (self.size <= 1e-13 * torch.maximum(self.t.abs(), ends.abs()))
        if not bool(stuck.any()):
            return
        sample = int(stuck.nonzero()[0])
        t, size, off = float(self.t[sample]), float(self.size[sample]), float(error[sample])
        if not math.isfinite(off):
            raise NonFiniteError(non_finite(t, f"of sample {sample} for steps down to {size:.1e}"))
        raise ConvergenceError(underflow(f"t = {t:.6g} (sample {sample})", size, off, self.rtol, self.atol))


def _norm(ratio: Tensor) -> Tensor:
    """The root mean square of each sample, in float64."""
    rows = ratio.reshape(len(ratio), -1)
    return torch.linalg.vector_norm(rows, dim=1).double() / math.sqrt(max(rows.shape[1], 1))
