"""The continuous adjoint: the costate integrated backwards beside the state, from one output time to the one before."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ocnopt.differential.columns import Columns
from ocnopt.differential.discrete import Costate, Observer
from ocnopt.differential.flow import Pulled
from ocnopt.differential.stretches import Packing, blocks_of, carry
from ocnopt.differential.sweep import sweep
from ocnopt.integrate import adaptive
from ocnopt.integrate.runge_kutta import Time
from ocnopt.integrate.walk import Step
from ocnopt.neural.evaluation import Evaluation
from ocnopt.neural.solve import Job, Walked


class Interval(NamedTuple):
    """What lies between two outputs, with the state at its end and dL/dx of the output there."""

    start: float
    end: float
    output: int
    state: Tensor
    jump: Tensor | None


class Continuous:
    """The costate equation, integrated backwards as one column beside the path, with error control of its own.

    The column goes in units of ten times its own root mean square at the end of each interval: a tolerance then means
    the same for every scaling of the loss, and the kinks that a costate inherits from ReLUs do not rule the step size.
    At an output the cotangent of the output is added, and x starts again from the output itself.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._adaptive = job.integrate.func is adaptive.integrate

    def forward(self, x: Tensor) -> Walked:
        """Walk; saved are F at the end and the states at the outputs."""
        surroundings = self.job.evaluation.surroundings
        before = surroundings.noise()
        self._first = self.job.evaluation.root(self.job.times[0], x).slope
        walk = self.job.walk(x, self._first)
        end, random = walk.states[-1], surroundings.moved(before)
        self.job = self.job.ending(walk.end)
        if random:
            warnings.warn(
                "the field draws random numbers (dropout?), and the continuous adjoint meets other ones on its way "
                'back: its gradient is not that of this forward pass; use adjoint="discrete"',
                stacklevel=2,
            )
        slope = self.job.evaluation(self.job.times[-1], end) if walk.slope is None else walk.slope
        # The way back begins with the evaluation that the way there ended with, but for random numbers.
        self._repeats = not random
        self.job.evaluation.note_attributes()
        # Half of what the path alone would bear: the costate may bend where the path does not.
        self._size = 0.5 * walk.next_size
        # The last output is the caller's, who may work on it in place.
        return Walked(walk.states, x, [slope, *walk.states[:-1], end.clone()])

    def backward(self, saved: Sequence[Tensor], value: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Integrate from the last output to the start."""
        job, (slope, *states) = self.job, saved
        job.tell_terminal(states[-1], slope, jumps)
        ends = enumerate(zip(job.times[:-1], job.times[1:], states, strict=True), start=1)
        intervals = [Interval(start, end, i, state, jumps.get(i)) for i, (start, end, state) in ends]
        x, span = value.x, abs(job.times[-1] - job.times[0])
        field = _Joined(job.evaluation, x, slope if self._repeats else None, span)
        blank = Columns(x, torch.zeros_like(field.r), field.r, x.new_zeros(int(self._adaptive)), x.new_ones(()))
        value, _ = sweep(partial(self._back, field, blank), intervals, value)
        return value._replace(parameters=field.split(blank.in_p))

    def _back(self, field: "_Joined", blank: Columns, interval: Interval, value: Costate) -> tuple[Costate, None]:
        """The step of the sweep: the costate from the end of an interval to its start."""
        job, jump, state = self.job, interval.jump, interval.state
        x = value.x if jump is None else value.x + jump
        unit = 10.0 * float(torch.linalg.vector_norm(x)) / max(1, x.numel()) ** 0.5 or 1.0
        column = replace(blank, q=x / unit, unit=unit)
        packing = Packing.of((state, *blocks_of(column)), ())
        # An event has ended the path; there is none on the way back, where the walk sees the column besides.
        integrate = partial(job.integrate, watch=None)
        if self._adaptive:
            integrate = partial(integrate, first_size=self._size, norm=_norm)
        column = carry(
            column,
            field,
            (state,),
            (interval.end, interval.start),
            packing=packing,
            tableau=job.tableau,
            integrate=integrate,
            on_step=None if job.observer is None else partial(self._watch, job.observer, packing, unit),
        )
        start = column.q * unit
        if job.evaluation.moving:
            if jump is not None:
                value.times[interval.output] += _dot(jump, job.evaluation(interval.end, state))
            if interval.output == 1:
                value.times[0] -= _dot(start, self._first)
        return value._replace(x=start, interval=interval.output), None

    def _watch(self, observer: Observer, packing: Packing, unit: float, step: Step) -> None:
        """Evaluate the stages of a step once more: it is known to be accepted only after the last of them."""
        for weight, t, y in zip(self.job.tableau.quadrature, step.stages.times, step.stages.points, strict=True):
            if weight > 0.0:
                x, q, _ = packing.unpack(y)
                watch = observer.stage(abs(step.size) * weight, -step.size * weight)
                self.job.evaluation.pull(t, x, q * unit, watch=watch)


class _Joined:
    """The field with its parameters as one vector, and which of them something has reached.

    Its first evaluation must give ``expected``, if that is known. It also sets the length of the witness's direction r:
    a large gradient counts a tenth, as the column does for step control, a small one is seen as it is.
    """

    def __init__(self, evaluation: Evaluation, x: Tensor, expected: Tensor | None, span: float) -> None:
        self._evaluation, self._parameters = evaluation, evaluation.parameters
        self._expected, self._span = expected, span
        self.sizes = [p.numel() for p in self._parameters]
        self.dtype = reduce(torch.promote_types, {p.dtype for p in self._parameters}, torch.float32)
        generator = torch.Generator(x.device).manual_seed(0)
        self.r = torch.randn(sum(self.sizes), generator=generator, device=x.device).to(self.dtype)
        self.r /= max(1, x.shape[0]) if x.ndim > 1 else 1
        self._reached: set[int] = set()
        self._is_first = True

    def split(self, vector: Tensor) -> list[Tensor | None]:
        """The gradient of each parameter; None where nothing has reached it."""
        parts = zip(self._parameters, vector.split_with_sizes(self.sizes), strict=True)
        return [part.view_as(p) if i in self._reached else None for i, (p, part) in enumerate(parts)]

    def pull(self, t: Time, x: Tensor, columns: Tensor, *, wanted: bool) -> Pulled:
        """The field's own products, F_theta^T q in one piece."""
        F, Fxq, terms = self._evaluation.pull(t, x, columns, wanted=wanted)
        if self._expected is not None:
            self._evaluation.require_same(F, self._expected)
            self._expected = None
        reached = [i for i, term in enumerate(terms) if term is not None]
        if not reached:
            return Pulled(F, Fxq, None)
        self._reached.update(reached)
        if len(reached) < len(terms):
            terms = [torch.zeros_like(p) if g is None else g for g, p in zip(terms, self._parameters, strict=True)]
        Fpq = _flatten_dense_tensors(terms).to(self.dtype)
        if self._is_first:
            self._is_first = False
            self.r /= max(1.0, 10.0 * self._span * abs(float(Fpq @ self.r)))
        return Pulled(F, Fxq, Fpq)


def _norm(y: Tensor) -> Tensor:
    """The root mean square of the path and the column; the witness is not lost among their entries."""
    return torch.maximum(adaptive.root_mean_square(y[:-1]), y[-1].abs())


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)
