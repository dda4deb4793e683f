"""A whole solve for autograd: the walk forwards, the chosen adjoint backwards.

``Discrete`` keeps the graph of the first steps, through which autograd goes back by itself; the others are one node,
which takes them again and pulls them back. :class:`ocnopt.neural.continuous.Continuous` keeps the output states and is
one node that integrates the costate. What a node needs is saved through autograd, which frees it afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.differential.discrete import Costate, DiscreteStep, EndObserver, Observer, Replays, Trajectory
from ocnopt.differential.sweep import sweep
from ocnopt.integrate.runge_kutta import Take
from ocnopt.integrate.runge_kutta import step as take_step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step, Walk
from ocnopt.neural.checks import check_not_transformed, noisy_stages
from ocnopt.neural.evaluation import Evaluation, Noise, Root
from ocnopt.neural.second import ONCE, Last, Repeatable, Twice, take_again


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
        solved = self.job.tableau.is_solved_in_turn
        root = evaluation.root(self.job.times[0], x, joins=bool(joins) and not solved)
        noisy = surroundings.moved(before)
        if noisy and solved:
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
        with torch.set_grad_enabled(root.nbytes is not None):
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
                gradients = Last.apply(ONCE, len(gradients), *gradients, x, *parameters, *felt.values())
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
