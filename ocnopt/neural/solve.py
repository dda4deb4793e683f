"""A whole solve as one node of autograd: the walk forwards, the chosen adjoint backwards.

``Discrete`` keeps the accepted steps and pulls them back, ``Continuous`` keeps the output states and integrates the
costate. What must survive until the backward pass is saved through autograd, which frees it afterwards.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ocnopt.differential.columns import Columns
from ocnopt.differential.discrete import (
    Costate,
    DiscreteStep,
    Gradient,
    Observer,
    Path,
    StepPull,
    Trajectory,
)
from ocnopt.differential.flow import Pulled
from ocnopt.differential.path import Packing, blocks_of, carry
from ocnopt.differential.sweep import sweep
from ocnopt.errors import OcnoptError
from ocnopt.integrate import adaptive
from ocnopt.integrate.runge_kutta import Take, Time
from ocnopt.integrate.runge_kutta import step as take_step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step, Walk
from ocnopt.neural.evaluation import Evaluation, Noise, Root


@dataclass(frozen=True)
class Job:
    """One solve: the field, the method, the walk with method and tolerances bound, start and output times."""

    evaluation: Evaluation
    tableau: Tableau
    integrate: partial[Walk]
    path: Sequence[float]
    observer: Observer | None

    def walk(
        self,
        x: Tensor,
        first: Tensor | None = None,
        on_step: Callable[[Step], None] | None = None,
        take: Take = take_step,
    ) -> Walk:
        """Walk the path and note its statistics."""
        walk = self.integrate(self.evaluation, x, self.path, first=first, on_step=on_step, take=take)
        self.evaluation.statistics.steps, self.evaluation.statistics.rejected = walk.steps, walk.rejected
        return walk

    def tell_terminal(self, x: Tensor, slope: Tensor | None, costate: Tensor) -> None:
        """Tell the observer about the end of the path."""
        if self.observer is not None:
            slope = self.evaluation(self.path[-1], x) if slope is None else slope
            self.observer.terminal(x, slope, costate)


class Discrete:
    """The exact gradient of the accepted steps, which are kept within ``budget`` bytes.

    Graphs are kept only if ``graphs``, and not where somebody watches: observers see evaluations in the backward pass.
    """

    def __init__(self, job: Job, budget: int, graphs: bool) -> None:
        self.job, self._budget = job, budget
        self._graphs = graphs and job.observer is None and not job.evaluation.moving
        self._slope: Tensor | None = None

    @property
    def repeats(self) -> bool:
        """Whether the backward pass evaluates the field again."""
        return self._trajectory.prefix < len(self._trajectory.steps)

    def forward(self, x: Tensor) -> tuple[Walk, list[Tensor]]:
        """Walk, and what must be saved: x(T), then the trajectory's tensors."""
        evaluation, surroundings = self.job.evaluation, self.job.evaluation.surroundings
        before = surroundings.noise()
        root = evaluation.root(self.job.path[0], x)
        noisy = surroundings.moved(before)
        walk = self._walk(root, before if noisy else None)
        if not noisy and self.repeats and surroundings.moved(before):
            # The field drew its first random numbers on the way: walk again and note their states.
            surroundings.set_noise(before)
            walk = self._walk(root, before)
        if self.repeats:
            surroundings.note_attributes()
        self._slope = None if self.job.observer is None or walk.slope is None else walk.slope.detach()
        *states, end = (state.detach() for state in walk.states)
        # The last output is the caller's, who may work on it in place.
        return walk._replace(states=[*states, end.clone()]), [end, *self._trajectory.release()]

    def _walk(self, root: Root, noise: Noise | None) -> Walk:
        job = self.job
        log = job.evaluation.log = None if noise is None else StageLog(job.tableau)
        if log is not None and noise is not None:
            log.add(noise)
        kept = root.nbytes if self._graphs else None
        self._trajectory = Trajectory(job.tableau, job.evaluation, self._budget, kept, log)
        walk = job.walk(root.x, root.slope, self._trajectory.append, self._trajectory.take)
        job.evaluation.log = None
        return walk

    def backward(self, saved: Sequence[Tensor], terminal: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Pull the steps back from the last to the first."""
        job, (end, *kept) = self.job, saved
        job.tell_terminal(end, self._slope, terminal.x)
        pull = StepPull(job.tableau, job.evaluation, job.observer, job.evaluation.moving)
        return sweep(DiscreteStep(pull, jumps, job.path), Path(self._trajectory, kept, end), terminal)[0]


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

    repeats = True

    def __init__(self, job: Job) -> None:
        self.job = job
        self._adaptive = job.integrate.func is adaptive.integrate
        self._slope: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Walk, list[Tensor]]:
        """Walk, and what must be saved: the output states."""
        surroundings = self.job.evaluation.surroundings
        before = surroundings.noise()
        self._first = self.job.evaluation.root(self.job.path[0], x).slope.detach()
        walk = self.job.walk(x, self._first)
        if surroundings.moved(before):
            warnings.warn(
                "the field draws random numbers (dropout?), and the continuous adjoint meets other ones on its way "
                "back: "
                'its gradient is not that of this forward pass; use adjoint="discrete"',
                stacklevel=2,
            )
        self._slope = None if self.job.observer is None else walk.slope
        # Half of what the path alone would bear: the costate may bend where the path does not.
        self._size = 0.5 * walk.next_size
        # The last output is the caller's, who may work on it in place.
        return walk, [*walk.states[:-1], walk.states[-1].clone()]

    def backward(self, saved: Sequence[Tensor], terminal: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Integrate from the last output to the start."""
        job = self.job
        job.tell_terminal(saved[-1], self._slope, terminal.x)
        ends = enumerate(zip(job.path[:-1], job.path[1:], saved, strict=True), start=1)
        # The sweep starts from zero, so that the last output's cotangent is a jump like any other.
        jumps = {**jumps, len(saved): terminal.x}
        intervals = [Interval(start, end, i, state, jumps.get(i)) for i, (start, end, state) in ends]
        nothing = terminal._replace(x=torch.zeros_like(terminal.x))
        field = _Joined(job.evaluation)
        blank = self._blank(field, terminal.x)
        value, _ = sweep(partial(self._back, field, blank), intervals, nothing)
        value.parameters.totals = field.split(blank.in_p)
        return value

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

    def _blank(self, field: "_Joined", x: Tensor) -> Columns:
        """The column before it starts, with nothing gathered and nothing seen."""
        generator = torch.Generator(x.device).manual_seed(0)
        r = torch.randn(sum(field.sizes), generator=generator, device=x.device).to(field.dtype)
        r /= x.shape[0] if x.ndim > 1 else 1
        return Columns(x, torch.zeros_like(r), r, x.new_zeros(int(self._adaptive)), x.new_ones(()))


class _Joined:
    """The field with its parameters as one vector, and which of them something has reached."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self._parameters = evaluation, evaluation.parameters
        self.sizes = [p.numel() for p in self._parameters]
        self.dtype = reduce(torch.promote_types, {p.dtype for p in self._parameters}, torch.float32)
        self._reached: set[int] = set()

    def split(self, vector: Tensor) -> list[Tensor | None]:
        """The gradient of each parameter; None where nothing has reached it."""
        parts = zip(self._parameters, vector.split_with_sizes(self.sizes), strict=True)
        return [part.view_as(p) if i in self._reached else None for i, (p, part) in enumerate(parts)]

    def pull(self, t: Time, x: Tensor, columns: Tensor, *, wanted: bool) -> Pulled:
        """The field's own products, F_theta^T q in one piece."""
        F, Fxq, terms = self._evaluation.pull(t, x, columns, wanted=wanted)
        reached = [i for i, term in enumerate(terms) if term is not None]
        if not reached:
            return Pulled(F, Fxq, None)
        self._reached.update(reached)
        if len(reached) < len(terms):
            terms = [torch.zeros_like(p) if g is None else g for g, p in zip(terms, self._parameters, strict=True)]
        return Pulled(F, Fxq, _flatten_dense_tensors(terms).to(self.dtype))


def _norm(y: Tensor) -> Tensor:
    """The root mean square of the path and the column; the witness is not lost among their entries."""
    return torch.maximum(adaptive.root_mean_square(y[:-1]), y[-1].abs())


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, adjoint: Discrete | Continuous, x: Tensor, moving: Tensor | None, *parameters: Tensor) -> Any:
        walk, kept = adjoint.forward(x)
        adjoint.job.evaluation.surroundings.close(repeats=adjoint.repeats)
        ctx.adjoint, ctx.count = adjoint, len(parameters)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, *kept)
        return tuple(walk.states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        x, *saved = ctx.saved_tensors
        parameters, kept = saved[: ctx.count], saved[ctx.count :]
        end = torch.zeros_like(x) if cotangents[-1] is None else cotangents[-1].detach()
        jumps = {i: jump.detach() for i, jump in enumerate(cotangents[:-1], start=1) if jump is not None}
        times = end.new_zeros(len(cotangents) + 1, dtype=torch.float64)
        with ctx.adjoint.job.evaluation.replaying():
            costate = ctx.adjoint.backward(kept, Costate(end, Gradient(ctx.count), times), jumps)
        gradients: tuple[Tensor | None, ...] = (
            costate.x if ctx.needs_input_grad[1] else None,
            costate.times if ctx.needs_input_grad[2] else None,
            *costate.parameters.totals,
        )
        if torch.is_grad_enabled():
            gradients = _Last.apply(len(gradients), *gradients, x, *parameters)
        return None, *gradients


class _Last(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise OcnoptError(
            "the gradient of a NeuralODE was differentiated once more; its adjoint solve gives first derivatives only: "
            "use "
            'adjoint="backprop", or oc.hvp and oc.differentiate for second derivatives'
        )


def solve(job: Job, x: Tensor, moving: Tensor | None, budget: int | None) -> tuple[Tensor, ...]:
    """The output states of a job, differentiable by the discrete adjoint, or the continuous one without a budget.

    Args:
        job: what to solve.
        x: the state at the start.
        moving: start and output times as a tensor where they need gradients.
        budget: bytes of states and graphs that the discrete adjoint may keep.
    """
    graphs = x.requires_grad or bool(job.evaluation.parameters)
    adjoint = Continuous(job) if budget is None else Discrete(job, budget, graphs)
    return _Node.apply(adjoint, x, moving, *job.evaluation.parameters)
