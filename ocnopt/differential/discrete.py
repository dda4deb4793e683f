"""The exact gradient of a Runge-Kutta solve: its accepted steps are pulled back from the last to the first.

A step x_next = x + h sum_i b_i F(t_i, y_i), y_i = x + h sum_{j<i} a_ij F(t_j, y_j), maps the costate dL/dx_next to
dL/dx and adds to dL/dtheta: one vector-Jacobian product by autograd through the whole step, for any explicit tableau.
The graph of a step is that of the forward pass where it was kept (:class:`Trajectory`); elsewhere the step is taken
again from the state at its start.

Step sizes count as constants. As times move, all steps of an interval stretch with it: the step from t + shift of
length stretch h is that from t of length h with the field stretch F(tau + shift + (stretch - 1)(tau - t), y), so
dL/dshift and dL/dstretch at 0 and 1 are two more products of the same pull.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.runge_kutta import Field, Stages, Time, step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step


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

    def weighed(self) -> AbstractContextManager[dict[int, int]]:
        """Measure what autograd saves, in bytes by address, known when the context closes."""

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
    """An accepted step to be pulled back, from ``start``.

    ``end`` carries the graph of the step where it was kept; ``expected`` is what a replay must reproduce, if known.
    """

    step: Taken
    start: Tensor
    end: Tensor | None = None
    expected: Tensor | None = None


class Trajectory:
    """Records the accepted steps of a walk, for walking backwards.

    States are kept as long as ``budget`` lasts, and in what remains of it the graphs of the first steps. Where the
    states alone are too many, only every stride-th is kept, stride at most about the square root of the number of
    steps, and each stretch is taken again, bit for bit, when the backward walk reaches it.

    Args:
        tableau: the method.
        field: takes the steps again.
        budget: bytes to keep.
        graphs: whether graphs are kept; the walk must then take its steps by :meth:`take`.
        log: notes of the evaluations, where the field needs them to be repeated.
    """

    def __init__(
        self,
        tableau: Tableau,
        field: Differentiable,
        budget: int,
        graphs: bool = False,
        log: StageLog[Any] | None = None,
    ) -> None:
        self.tableau, self.field, self._budget, self._log = tableau, field, budget, log
        self._graphs = graphs and budget > 0
        self.steps: list[Taken] = []
        self.kept: list[int] = []
        self._starts: dict[int, Tensor] = {}
        self._ends: list[Tensor] = []
        self._end: Tensor | None = None
        self._stride, self._graph_bytes, self.is_whole = 1, 0, False

    def take(
        self, tableau: Tableau, field: Field, t: Time, h: float, x: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Stages]:
        """Take a step as :func:`ocnopt.integrate.runge_kutta.step` does, with a graph of its own while it is kept."""
        self._end = None
        if not self._graphs:
            return step(tableau, field, t, h, x, first)
        complete = first is None or tableau.first_same_as_last
        weigh = self.field.weighed() if complete and not self._graph_bytes else nullcontext()
        with torch.enable_grad(), weigh as sizes:
            self._end, seen = step(shortened(tableau), field, t, h, x, first)
            x = self._end.detach().requires_grad_()
            if tableau.first_same_as_last:
                # The graph of the next step begins at its own leaf.
                last = t + tableau.c[-1] * h
                seen.times.append(last)
                seen.points.append(x)
                seen.slopes.append(field(last, x))
        if sizes is not None:
            self._graph_bytes = sum(sizes.values())  # all steps save as much
        return x, seen

    def append(self, taken: Step) -> None:
        """Keep one accepted step."""
        notes = (None,) * len(self.tableau.c) if self._log is None else self._log.accept()
        if len(self.steps) % self._stride == 0:
            self._starts[len(self.steps)] = taken.stages.points[0]
        self.steps.append(Taken(taken.time, taken.size, notes, taken.output))
        if self._end is not None:
            self._ends.append(self._end)
        state = taken.stages.points[0].nbytes
        while len(self._starts) * state + len(self._ends) * self._graph_bytes > self._budget:
            if self._ends:
                self._graphs = False
                self._ends.pop()
            elif 2 * self._stride**2 < len(self.steps):
                self._stride *= 2
                self._starts = {i: start for i, start in self._starts.items() if i % self._stride == 0}
            else:
                break
        self.is_whole = len(self._ends) == len(self.steps)

    def release(self) -> list[Tensor]:
        """Hand over the tensors, so that autograd keeps and frees them; the steps stay."""
        tensors = [*self._starts.values(), *self._ends]
        self.kept, self._starts, self._ends, self._end = [*self._starts], {}, [], None
        return tensors


class Path:
    """The steps of a finished walk, from the last to the first.

    Args:
        trajectory: what was recorded.
        tensors: what it handed over.
        end: the state at the end.
    """

    def __init__(self, trajectory: Trajectory, tensors: Sequence[Tensor], end: Tensor) -> None:
        count = len(trajectory.kept)
        self._trajectory, self._end = trajectory, end
        self._starts, self._ends = dict(zip(trajectory.kept, tensors, strict=False)), tensors[count:]

    def __iter__(self) -> Iterator[Replay]:
        yield from [*reversed(self)][::-1]

    def __reversed__(self) -> Iterator[Replay]:
        steps = self._trajectory.steps
        expected: Tensor | None = self._end
        stop = len(steps)
        for kept in sorted(self._starts, reverse=True):
            stretch = self._retaken(kept, stop)
            for i in range(stop - 1, kept - 1, -1):
                yield Replay(steps[i], stretch.pop(), self._ends[i] if i < len(self._ends) else None, expected)
                expected = None
            stop = kept

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
        observer: watches every evaluation of a replayed step.
        moving: whether dL/dstretch and dL/dshift are wanted; then, too, steps must be replayed.
    """

    def __init__(
        self, tableau: Tableau, field: Differentiable, observer: Observer | None = None, moving: bool = False
    ) -> None:
        self._tableau, self._field, self._observer, self._moving = shortened(tableau), field, observer, moving

    def __call__(self, replay: Replay, costate: Tensor, gradient: Gradient) -> PulledStep:
        """Map the costate at the end of a step to its start, and add to the gradient."""
        taken, start, end = replay.step, replay.start, replay.end
        moves: Sequence[Tensor] = ()
        if end is None:
            start = start.detach().requires_grad_()
            stages = None
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
        if replay.end is None and replay.expected is not None:
            self._field.require_same(end, replay.expected, inputs)
        # A kept graph may be pulled again: autograd frees it with the node of the solve.
        x, *found = torch.autograd.grad(end, inputs, costate, retain_graph=end is replay.end, allow_unused=True)
        count = len(self._field.parameters)
        gradient.add(found[:count])
        return PulledStep(x, *found[count:])


def _moved(field: Field, start: float, stretch: Tensor, shift: Tensor) -> Field:
    """The field of a step that moves by ``shift`` and grows by ``stretch``."""
    return lambda t, y: stretch.to(y.dtype) * field(t + shift + (stretch - 1.0) * (t - start), y)


class DiscreteStep:
    """The step of the sweep: one accepted Runge-Kutta step backwards.

    Args:
        pull_step: the vector-Jacobian product of a step.
        jumps: dL/dx at outputs before the end, by their index in ``times``.
        times: start and outputs, where dL/dtimes is wanted.
    """

    def __init__(self, pull_step: StepPull, jumps: Mapping[int, Tensor], times: Sequence[float] = ()) -> None:
        self._pull_step, self._jumps, self._times = pull_step, jumps, times

    def __call__(self, replay: Replay, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of a step to its start."""
        x, interval = value.x, value.interval
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
