"""A whole solve for autograd: the walk forwards, the chosen adjoint backwards.

``Discrete`` keeps the graph of the first steps, through which autograd goes back by itself; the others are one node,
which takes them again and pulls them back. ``Continuous`` keeps the output states and is one node that integrates the
costate. What a node needs is saved through autograd, which frees it afterwards.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ocnopt.differential.columns import Columns
from ocnopt.differential.discrete import Costate, DiscreteStep, EndObserver, Observer, Replays, Trajectory
from ocnopt.differential.flow import Pulled
from ocnopt.differential.stretches import Packing, blocks_of, carry
from ocnopt.differential.sweep import sweep
from ocnopt.integrate import adaptive
from ocnopt.integrate.runge_kutta import Take, Time
from ocnopt.integrate.runge_kutta import step as take_step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step, Walk
from ocnopt.neural.checks import check_not_transformed, noisy_stages
from ocnopt.neural.evaluation import Evaluation, Noise, Root
from ocnopt.neural.second import Last, Repeatable, Twice, take_again


@dataclass(frozen=True)
class Job:
    """One solve: the field, the method, the walk with method and tolerances bound, start and output times.

    ``observer`` watches the steps, ``ends`` are told about the end of the horizon if ``at_end`` says that it is the
    last time. ``dense`` says whether the walk interpolates the other outputs.
    """

    evaluation: Evaluation
    tableau: Tableau
    integrate: partial[Walk]
    times: Sequence[float]
    observer: Observer | None
    at_end: bool = True
    dense: bool = False
    ends: Sequence[EndObserver] = ()

    def walk(
        self,
        x: Tensor,
        first: Tensor | None = None,
        on_step: Callable[[Step], None] | None = None,
        take: Take = take_step,
    ) -> Walk:
        """Walk the path and note its statistics."""
        walk = self.integrate(self.evaluation, x, self.times, first=first, on_step=on_step, take=take, dense=self.dense)
        self.evaluation.statistics.steps, self.evaluation.statistics.rejected = walk.steps, walk.rejected
        return walk

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dL/dtimes."""
        return (len(self.times),)

    def ending(self, end: float) -> "Job":
        """The job as its walk has ended."""
        return self if end == self.times[-1] else replace(self, times=[*self.times[:-1], end])

    def tell_terminal(self, x: Tensor, slope: Tensor | None, jumps: Mapping[int, Tensor]) -> None:
        """Tell who watches it about the end of the path."""
        if self.ends and self.at_end:
            slope = self.evaluation(self.times[-1], x) if slope is None else slope
            costate = jumps.get(len(self.times) - 1)
            for observer in self.ends:
                observer.terminal(x, slope, torch.zeros_like(x) if costate is None else costate)


class Walked(NamedTuple):
    """A walk as the adjoint leaves it.

    The first ``joined`` of the states at the outputs carry the graph of the steps behind them. A node of autograd, with
    the tensors ``saved``, leads from ``start`` to the others.
    """

    outputs: list[Tensor]
    start: Tensor
    saved: list[Tensor]
    joined: int = 0


class Discrete:
    """The exact gradient of the accepted steps, which are kept within ``budget`` bytes.

    Where somebody watches the steps, or times move, no graph is kept: both act on evaluations in the backward pass.
    """

    def __init__(self, job: Job, budget: int) -> None:
        self.job, self._budget = job, budget
        self._slope: Tensor | None = None

    def forward(self, x: Tensor) -> Walked:
        """Walk; saved is x(T), then the trajectory's states."""
        evaluation, surroundings = self.job.evaluation, self.job.evaluation.surroundings
        before = surroundings.noise()
        joins = self.job.observer is None and not evaluation.moving and (x.requires_grad or evaluation.parameters)
        implicit = self.job.tableau.is_implicit
        root = evaluation.root(self.job.times[0], x, joins=bool(joins) and not implicit)
        noisy = surroundings.moved(before)
        if noisy and implicit:
            raise noisy_stages(self.job.tableau.name)
        walk = self._walk(root, before if noisy else None)
        if not noisy and self._trajectory.steps and surroundings.moved(before):
            # The field drew its first random numbers on the way: walk again and note their states.
            surroundings.set_noise(before)
            surroundings.set_buffers()
            walk = self._walk(root, before)
        self.job = self.job.ending(walk.end)
        self._slope = None if walk.slope is None else walk.slope.detach()
        joined, end = self._trajectory.outputs, self._trajectory.end
        if end is not None:
            evaluation.watch_buffers({id(state): state for state in (*walk.states[:joined], end)}.values())
        if not self._trajectory.steps:
            if self.job.ends and walk.states[-1].requires_grad:
                self._tell_of(walk.states[-1])
            return Walked(walk.states, x, [], joined)
        evaluation.note_attributes()
        rest = [state.detach() for state in walk.states[joined:]]
        # The last output is the caller's, who may work on it in place.
        saved = [rest[-1].clone(), *self._trajectory.release()]
        return Walked([*walk.states[:joined], *rest], x if end is None else end, saved, joined)

    def _tell_of(self, state: Tensor) -> None:
        """Tell about the end of a path that no node of autograd follows, as the gradient arrives there."""
        end, job = state.detach(), self.job
        job.evaluation.surroundings.note_buffers()

        def arrive(costate: Tensor) -> None:
            with job.evaluation.replaying():
                job.tell_terminal(end, self._slope, {len(job.times) - 1: costate})

        state.register_hook(arrive)

    def _walk(self, root: Root, noise: Noise | None) -> Walk:
        job = self.job
        log = job.evaluation.log = None if noise is None else StageLog(job.tableau)
        if log is not None and noise is not None:
            log.add(noise)
        self._trajectory = Trajectory(job.tableau, job.evaluation, self._budget, root.nbytes, log)
        walk = job.walk(root.x, root.slope, self._trajectory.append, self._trajectory.take)
        job.evaluation.log = None
        return walk

    def backward(self, saved: Sequence[Tensor], value: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Pull the steps back from the last to the first."""
        job, (end, *states) = self.job, saved
        job.tell_terminal(end, self._slope, jumps)
        times, outputs = job.times if job.evaluation.moving else None, job.times if job.dense else ()
        step = DiscreteStep(job.tableau, job.evaluation, jumps, job.observer, times, outputs)
        return sweep(step, Replays(self._trajectory, states, end), value)[0]

    @property
    def evaluation(self) -> Evaluation:
        """The field."""
        return self.job.evaluation

    def again(self, x: Tensor, saved: Sequence[Tensor]) -> dict[int, Tensor]:
        """The outputs with the graph of all steps: see :class:`ocnopt.neural.second.Repeatable`."""
        job, steps = self.job, self._trajectory.steps
        outputs, end = take_again(job.tableau, job.evaluation, steps, job.times, x)
        job.evaluation.require_same(end, saved[0], (x, *job.evaluation.parameters))
        return outputs


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
        integrate = partial(job.integrate, first_size=self._size, norm=_norm) if self._adaptive else job.integrate
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


@runtime_checkable
class Solved(Protocol):
    """What an adjoint has to do."""

    @property
    def evaluation(self) -> Evaluation:
        """The field."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dL/dtimes."""


@runtime_checkable
class Adjoint(Protocol):
    """A way to walk, and to go back."""

    @property
    def job(self) -> Solved:
        """The solve."""

    def forward(self, x: Tensor) -> Walked:
        """Walk from x, without a graph but for what is joined."""

    def backward(self, saved: Sequence[Tensor], value: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Go back from cotangents of the outputs, by their index; the value begins at zero."""


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adjoint: Adjoint,
        joined: int,
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        x: Tensor,
        moving: Tensor | None,
        *parameters: Tensor,
    ) -> Any:
        ctx.adjoint, ctx.joined, ctx.count = adjoint, joined, len(parameters)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        check_not_transformed(cotangents)
        x, *saved = ctx.saved_tensors
        parameters, kept = saved[: ctx.count], saved[ctx.count :]
        job = ctx.adjoint.job
        jumps = {i: jump.detach() for i, jump in enumerate(cotangents, start=ctx.joined + 1) if jump is not None}
        # The sweep starts from zero, so that the last output's cotangent is a jump like any other.
        nothing = Costate(torch.zeros_like(x), [None] * ctx.count, x.new_zeros(job.shape, dtype=torch.float64))
        with job.evaluation.replaying():
            costate = ctx.adjoint.backward(kept, nothing, jumps)
        gradients: tuple[Tensor | None, ...] = (
            costate.x if ctx.needs_input_grad[4] else None,
            costate.times if ctx.needs_input_grad[5] else None,
            *costate.parameters,
        )
        if torch.is_grad_enabled():
            felt = {i: c for i, c in enumerate(cotangents, start=ctx.joined + 1) if c is not None}
            if isinstance(ctx.adjoint, Repeatable) and not job.evaluation.moving:
                gradients = Twice.apply(ctx.adjoint, [*felt], gradients, kept, x, *parameters, *felt.values())
            else:
                gradients = Last.apply(len(gradients), *gradients, x, *parameters, *felt.values())
        return None, None, None, None, *gradients


def solve(adjoint: Adjoint, x: Tensor, moving: Tensor | None) -> tuple[Tensor, ...]:
    """The output states of the adjoint's job, differentiable by it.

    Args:
        adjoint: what to solve and how to go back.
        x: the state at the start.
        moving: start and output times as a tensor where they need gradients.
    """
    evaluation = adjoint.job.evaluation
    with torch.no_grad():
        outputs, start, saved, joined = adjoint.forward(x)
    evaluation.surroundings.close()
    if joined == len(outputs):
        return tuple(outputs)
    check_not_transformed()
    evaluation.surroundings.note_buffers()
    rest = _Node.apply(adjoint, joined, outputs[joined:], saved, start, moving, *evaluation.parameters)
    return (*outputs[:joined], *rest)
