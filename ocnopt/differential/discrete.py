"""The exact gradient of a Runge-Kutta solve: its accepted steps are pulled back from the last to the first.

A step x_next = x + h sum_i b_i F(t_i, y_i), y_i = x + h sum_{j<i} a_ij F(t_j, y_j), maps the costate dL/dx_next to
dL/dx and adds to dL/dtheta: one vector-Jacobian product by autograd through the whole step, for any explicit tableau.
The first steps may have kept their graph (:class:`Trajectory`) and are one link; others are taken again from the state
at their start.

Step sizes count as constants. As times move, all steps of an interval stretch with it: the step from t + shift of
length stretch h is that from t of length h with the field stretch F(tau + shift + (stretch - 1)(tau - t), y), so
dL/dshift and dL/dstretch at 0 and 1 are two more products of the same pull.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.runge_kutta import Field, Stages, Time, step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step

# How much of the budget a graph may fill: a step's state is far smaller than its graph, the rest holds many.
_SHARE = 7 / 8


@runtime_checkable
class Observer(Protocol):
    """Watches a backward pass through its own evaluations of the field."""

    def stage(self, input_weight: float, gradient_weight: float) -> AbstractContextManager[Any]:
        """Give a context around one evaluation of the field with a graph.

        The gradients of its vector-Jacobian product arrive after the context has closed: those that arrive within it
        are the field's own, which may differentiate inside.

        Args:
            input_weight: weight of what flows in there in an integral over time: >= 0, summing to the time integrated.
            gradient_weight: factor that turns the gradient seen there into its contribution to the integral over time.
        """

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Receive x(T), F(T, x(T)) and dL/dx(T) once, with samples along the leading axis."""


class Observers(tuple[Observer, ...]):
    """Several observers as one."""

    __slots__ = ()

    def stage(self, input_weight: float, gradient_weight: float) -> ExitStack:
        """Enter the context of each."""
        stack = ExitStack()
        for observer in self:
            stack.enter_context(observer.stage(input_weight, gradient_weight))
        return stack

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Tell each."""
        for observer in self:
            observer.terminal(x, slope, costate)


class Pull(NamedTuple):
    """One evaluation F(t, y) and its products with a cotangent: F_y^T c, F_theta^T c for each parameter."""

    slope: Tensor
    x: Tensor
    parameters: Sequence[Tensor | None]


@runtime_checkable
class Differentiable(Protocol):
    """A field that adjoints can differentiate; a note says what else an evaluation saw (random numbers)."""

    parameters: Sequence[Tensor]

    def noted(self, notes: Sequence[Any], stages: Iterator[AbstractContextManager[Any]] | None = None) -> Field:
        """Return the field for a row of evaluations that see what the notes say, each within its context."""

    def require_same(self, came: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
        """Raise if a replayed state, differentiable in ``inputs``, is not that of the forward pass."""


class Gradient:
    """Running sum of parameter gradients; an entry stays None until something reaches it."""

    def __init__(self, size: int) -> None:
        self.totals: list[Tensor | None] = [None] * size

    def add(self, terms: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight`` times each term."""
        totals, found = [], []
        for i, term in enumerate(terms):
            if term is None:
                continue
            total = self.totals[i]
            if total is None:
                self.totals[i] = term * weight
            else:
                totals.append(total)
                found.append(term)
        if totals:
            torch._foreach_add_(totals, found, alpha=weight)


class Costate(NamedTuple):
    """The value of the sweep: Q_x, the running Q_theta, the running dL/dtimes, and the interval it stands in."""

    x: Tensor
    parameters: Gradient
    times: Tensor
    interval: int = 0


class Taken(NamedTuple):
    """An accepted step, without its tensors; ``output`` is i where it ends at ``times[i]``."""

    time: float
    size: float
    notes: Sequence[Any]
    output: int | None


class Replay(NamedTuple):
    """An accepted step to be taken again from ``start``; that must give what is ``expected``, where it is known."""

    step: Taken
    start: Tensor
    expected: Tensor | None = None


class Kept(NamedTuple):
    """The first steps of a path as one graph, from its leaf ``start`` to ``end``, with the outputs i on the way."""

    start: Tensor
    end: Tensor
    outputs: Mapping[int, Tensor]


class Trajectory:
    """Records the accepted steps of a walk, for walking backwards.

    The first steps keep their graph, as long as it fills no more than most of ``budget``. From there on states are
    kept; where they are too many for what remains, only every stride-th, stride at most about the square root of the
    number of steps, and each stretch is taken again, bit for bit, when the backward walk reaches it.

    Args:
        tableau: the method.
        field: takes the steps again.
        budget: bytes to keep.
        evaluation: bytes that the graph of one evaluation keeps, or None to keep none; the walk must then start at a
            leaf and take its steps by :meth:`take`.
        log: notes of the evaluations, where the field needs them to be repeated.
    """

    def __init__(
        self,
        tableau: Tableau,
        field: Differentiable,
        budget: int,
        evaluation: int | None = None,
        log: StageLog[Any] | None = None,
    ) -> None:
        self.tableau, self.field, self._budget, self._log = tableau, field, budget, log
        self._graphs, self._stride = evaluation is not None and budget > 0, 1
        self._step = (evaluation or 0) * len(shortened(tableau).c)
        self.steps: list[Taken] = []
        self.prefix = 0
        self._states: dict[int, Tensor] = {}
        self._graph: dict[int, Tensor] = {}  # outputs of the first steps; at 0 their start, at -1 their end
        self.places: tuple[list[int], list[int]] = ([], [])

    def take(
        self, tableau: Tableau, field: Field, t: Time, h: float, x: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Stages]:
        """Take a step as :func:`ocnopt.integrate.runge_kutta.step` does, continuing the graph while it is kept."""
        if not self._graphs:
            return step(tableau, field, t, h, x.detach(), None if first is None else first.detach())
        with torch.enable_grad():
            return step(tableau, field, t, h, x, first)

    def append(self, taken: Step) -> None:
        """Keep one accepted step."""
        notes = (None,) * len(self.tableau.c) if self._log is None else self._log.accept()
        start, place = taken.stages.points[0], len(self.steps) - self.prefix
        self.steps.append(Taken(taken.time, taken.size, notes, taken.output))
        self._graphs = self._graphs and (self.prefix + 1) * self._step <= _SHARE * self._budget
        if self._graphs:
            self._graph |= {-1: taken.state} if self.prefix else {0: start, -1: taken.state}
            self._graph |= {} if taken.output is None else {taken.output: taken.state}
            self.prefix += 1
            return
        if place % self._stride == 0:
            self._states[self.prefix + place] = start.detach()
        room = self._budget - self.prefix * self._step
        while len(self._states) * start.nbytes > room and 2 * self._stride**2 <= place:
            self._stride *= 2
            self._states = {i: state for i, state in self._states.items() if (i - self.prefix) % self._stride == 0}

    def release(self) -> list[Tensor]:
        """Hand over the tensors, so that autograd keeps and frees them; the steps stay."""
        tensors = [*self._states.values(), *self._graph.values()]
        self.places = [*self._states], [*self._graph]
        self._states, self._graph = {}, {}
        return tensors


class Path:
    """The steps of a finished walk, from the last to the first.

    Args:
        trajectory: what was recorded.
        tensors: what it handed over.
        end: the state at the end.
    """

    def __init__(self, trajectory: Trajectory, tensors: Sequence[Tensor], end: Tensor) -> None:
        states, graph = trajectory.places
        self._trajectory, self._end = trajectory, end
        self._starts = dict(zip(states, tensors, strict=False))
        self._graph = dict(zip(graph, tensors[len(states) :], strict=True))

    def __iter__(self) -> Iterator[Replay | Kept]:
        yield from [*reversed(self)][::-1]

    def __reversed__(self) -> Iterator[Replay | Kept]:
        steps = self._trajectory.steps
        expected: Tensor | None = self._end
        stop = len(steps)
        for kept in sorted(self._starts, reverse=True):
            stretch = self._retaken(kept, stop)
            for i in range(stop - 1, kept - 1, -1):
                yield Replay(steps[i], stretch.pop(), expected)
                expected = None
            stop = kept
        if self._graph:
            outputs = {i: state for i, state in self._graph.items() if i > 0}
            yield Kept(self._graph[0], self._graph[-1], outputs)

    def _retaken(self, kept: int, stop: int) -> list[Tensor]:
        """The states at the starts of the steps from a kept one up to ``stop``."""
        tableau, x, first = self._trajectory.tableau, self._starts[kept], None
        states = [x]
        for taken in self._trajectory.steps[kept : stop - 1]:
            field = self._trajectory.field.noted(taken.notes[first is not None :])
            x, seen = step(tableau, field, taken.time, taken.size, x, first)
            first = seen.slopes[-1] if tableau.first_same_as_last else None
            states.append(x)
        return states


@cache
def shortened(tableau: Tableau) -> Tableau:
    """The method without a last stage that serves the next step alone: nothing flows back through it."""
    if not tableau.first_same_as_last:
        return tableau
    c, a, b, quadrature = tableau.c[:-1], tableau.a[:-1], tableau.b[:-1], tableau.quadrature[:-1]
    return replace(tableau, c=c, a=a, b=b, quadrature=quadrature, b_error=None, first_same_as_last=False)


class PulledStep(NamedTuple):
    """The costate at the start of a step, and dL/dstretch, dL/dshift of the step where they are wanted."""

    x: Tensor
    stretch: Tensor | None = None
    shift: Tensor | None = None


class StepPull:
    """The vector-Jacobian product of one step.

    Args:
        tableau: the method.
        field: the field.
        observer: watches every evaluation.
        moving: whether dL/dstretch and dL/dshift are wanted.
    """

    def __init__(
        self, tableau: Tableau, field: Differentiable, observer: Observer | None = None, moving: bool = False
    ) -> None:
        self._tableau, self._field, self._observer, self._moving = shortened(tableau), field, observer, moving

    def __call__(self, replay: Replay, costate: Tensor, gradient: Gradient) -> PulledStep:
        """Map the costate at the end of a step to its start, and add to the gradient."""
        taken, start = replay.step, replay.start.detach().requires_grad_()
        stages, moves = None, []
        if self._observer is not None:
            stages = map(self._observer.stage, [abs(taken.size) * w for w in self._tableau.quadrature], repeat(1.0))
        field = self._field.noted(taken.notes, stages)
        if self._moving:
            moves = [
                torch.tensor(value, dtype=torch.float64, device=start.device, requires_grad=True)
                for value in (1.0, 0.0)
            ]
            field = _moved(field, taken.time, *moves)
        with torch.enable_grad():
            end, _ = step(self._tableau, field, taken.time, taken.size, start)
        inputs = (start, *self._field.parameters, *moves)
        if replay.expected is not None:
            self._field.require_same(end, replay.expected, inputs)
        x, *found = torch.autograd.grad(end, inputs, costate, allow_unused=True)
        count = len(self._field.parameters)
        gradient.add(found[:count])
        return PulledStep(x, *found[count:])

    def all_kept(self, kept: Kept, costate: Tensor, jumps: Mapping[int, Tensor], gradient: Gradient) -> Tensor:
        """Map the costate at the end of the steps that kept their graph to the start of the path, all at once."""
        ends = {i: state for i, state in kept.outputs.items() if i in jumps}
        # The graph may be pulled again: autograd frees it with the node of the solve.
        x, *found = torch.autograd.grad(
            (kept.end, *ends.values()),
            (kept.start, *self._field.parameters),
            (costate, *(jumps[i] for i in ends)),
            retain_graph=True,
            allow_unused=True,
        )
        gradient.add(found)
        return x


def _moved(field: Field, start: float, stretch: Tensor, shift: Tensor) -> Field:
    """The field of a step that moves by ``shift`` and grows by ``stretch``."""
    return lambda t, y: stretch.to(y.dtype) * field(t + shift + (stretch - 1.0) * (t - start), y)


class DiscreteStep:
    """The step of the sweep: one accepted Runge-Kutta step backwards, or all those that kept their graph.

    Args:
        pull_step: the vector-Jacobian product of a step.
        jumps: dL/dx at outputs before the end, by their index in ``times``.
        times: start and outputs, where dL/dtimes is wanted.
    """

    def __init__(self, pull_step: StepPull, jumps: Mapping[int, Tensor], times: Sequence[float] = ()) -> None:
        self._pull_step, self._jumps, self._times = pull_step, jumps, times

    def __call__(self, replay: Replay | Kept, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of a link to its start."""
        x, interval = value.x, value.interval
        if isinstance(replay, Kept):
            return value._replace(x=self._pull_step.all_kept(replay, x, self._jumps, value.parameters)), None
        if replay.step.output is not None:
            interval = replay.step.output
            x = x + self._jumps[interval] if interval in self._jumps else x
        pulled = self._pull_step(replay, x, value.parameters)
        if pulled.stretch is not None:
            # An interval stretches its steps and moves their starts in proportion.
            start, length = self._times[interval - 1], self._times[interval] - self._times[interval - 1]
            shift = 0.0 if pulled.shift is None else pulled.shift
            stretch = pulled.stretch / length + shift * ((replay.step.time - start) / length)
            value.times[interval] += stretch
            value.times[interval - 1] += shift - stretch
        return Costate(pulled.x, value.parameters, value.times, interval), None
