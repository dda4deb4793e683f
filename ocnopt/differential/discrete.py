"""The exact gradient of a Runge-Kutta solve: its accepted steps are pulled back from the last to the first.

A step x_next = x + h sum_i b_i F(t_i, y_i), y_i = x + h sum_{j<i} a_ij F(t_j, y_j), maps the costate dL/dx_next to
dL/dx and adds to dL/dtheta: one vector-Jacobian product by autograd through the whole step, for any explicit tableau.
That is done here for steps that are taken again from the state at their start; the first steps of a walk may have kept
their graph (:class:`Trajectory`), through which autograd goes on by itself.

Step sizes count as constants. As times move, all steps of an interval stretch with it: the step from t + shift of
length stretch h is that from t of length h with the field stretch F(tau + shift + (stretch - 1)(tau - t), y), so
dL/dshift and dL/dstretch at 0 and 1 are two more products of the same pull.

A layer of a network is a step with controls of its own, its weights, which all samples share; its size may be one of
them. It is pulled back by the same product, and what reaches its controls is the readout of the sweep.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.runge_kutta import Field, Stages, Time, interpolate, step
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
        """See :class:`EndObserver`."""


@runtime_checkable
class EndObserver(Protocol):
    """Watches the end of the path alone, for which a solve gives up nothing."""

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Receive x(T), F(T, x(T)) and dL/dx(T) once, if the path ends there; samples along the leading axis.

        Where samples have times of their own, those that end elsewhere come with their end, and with zero for dL/dx.
        """


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

    def require_same(self, came: Tensor, expected: Tensor | None, inputs: Sequence[Tensor]) -> None:
        """Raise if a replayed state is not the expected one, or depends on something besides ``inputs``."""


def accumulate(totals: list[Tensor | None], terms: Sequence[Tensor | None]) -> None:
    """Add the terms to running sums, in place; a sum stays None until something reaches it."""
    summed, found = [], []
    for i, term in enumerate(terms):
        total = totals[i]
        if term is not None and total is None:
            totals[i] = term.clone()  # autograd may hand out one tensor twice
        elif term is not None and total is not None:
            summed.append(total)
            found.append(term)
    if summed:
        torch._foreach_add_(summed, found)


class Costate(NamedTuple):
    """The value of the sweep: Q_x, the running Q_theta and dL/dtimes, and the interval it stands in."""

    x: Tensor
    parameters: list[Tensor | None]
    times: Tensor
    interval: int = 0


class Taken(NamedTuple):
    """An accepted step, without its states; ``output`` is i where it ends at ``times[i]``, others may be inside."""

    time: Any
    size: Any
    notes: Sequence[Any]
    output: int | None
    inside: range = range(0)


class Replay(NamedTuple):
    """An accepted step to be taken again from ``start``; that must give what is ``expected``, where it is known."""

    step: Taken
    start: Tensor
    expected: Tensor | None = None


class Trajectory:
    """Records the accepted steps of a walk, for walking backwards.

    The first steps keep their graph, as long as it fills no more than most of ``budget``. From there on states are
    kept; where they are too many for what remains, only every stride-th, stride at most about the square root of the
    number of steps, and each stretch is taken again, bit for bit, when the backward walk reaches it.

    Args:
        tableau: the method.
        field: takes the steps again.
        budget: bytes to keep.
        evaluation: bytes that the graph of one evaluation keeps, where graphs are wanted; the walk must then take its
            steps by :meth:`take`, in grad mode.
        log: notes of the evaluations, where the field needs them to be repeated.

    Attributes:
        end: the state where the graph ends, if there is one.
        outputs: how many outputs it has reached.
        steps: those that follow.
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
        self._step, self._filled = (evaluation or 0) * len(shortened(tableau).c), 0
        self.end: Tensor | None = None
        self.outputs = 0
        self.steps: list[Taken] = []
        self.kept: list[int] = []
        self._states: dict[int, Tensor] = {}

    def take(
        self, tableau: Tableau, field: Field, t: Time, h: float, x: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Stages]:
        """Take a step as :func:`ocnopt.integrate.runge_kutta.step` does, continuing the graph while it is kept."""
        if self._graphs:
            return step(tableau, field, t, h, x, first)
        with torch.no_grad():
            return step(tableau, field, t, h, x.detach(), None if first is None else first.detach())

    def append(self, taken: Step) -> None:
        """Keep one accepted step."""
        notes: Sequence[Any] = () if self._log is None else self._log.accept()
        self._graphs = self._graphs and self._filled + self._step <= _SHARE * self._budget
        if self._graphs:
            self._filled += self._step
            self.end = taken.state
            self.outputs += len(taken.inside) + (taken.output is not None)
            return
        place, start = len(self.steps), taken.stages.points[0]
        notes = notes or (None,) * len(self.tableau.c)
        self.steps.append(Taken(taken.time, taken.size, notes, taken.output, taken.inside))
        if place % self._stride == 0:
            self._states[place] = start.detach()
        while len(self._states) * start.nbytes > self._budget - self._filled and 2 * self._stride**2 <= place:
            self._stride *= 2
            self._states = {i: state for i, state in self._states.items() if i % self._stride == 0}

    def release(self) -> list[Tensor]:
        """Hand over the states, so that autograd keeps and frees them; the steps stay."""
        states, self.kept, self._states = [*self._states.values()], [*self._states], {}
        return states


class Replays:
    """The steps of a finished walk that are taken again, from the last to the first.

    Args:
        trajectory: what was recorded.
        states: what it handed over.
        end: the state at the end.
    """

    def __init__(self, trajectory: Trajectory, states: Sequence[Tensor], end: Tensor) -> None:
        self._trajectory, self._end = trajectory, end
        self._starts = dict(zip(trajectory.kept, states, strict=True))

    def __iter__(self) -> Iterator[Replay]:
        yield from [*reversed(self)][::-1]

    def __reversed__(self) -> Iterator[Replay]:
        steps = self._trajectory.steps
        stop, expected = len(steps), self._end
        for kept in sorted(self._starts, reverse=True):
            stretch = self._retaken(kept, stop)
            for i in range(stop - 1, kept - 1, -1):
                yield Replay(steps[i], stretch.pop(), expected if i == stop - 1 else None)
            stop, expected = kept, self._starts[kept]

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
    if not tableau.first_same_as_last or tableau.is_solved_in_turn:
        return tableau
    c, a, b, quadrature = tableau.c[:-1], tableau.a[:-1], tableau.b[:-1], tableau.quadrature[:-1]
    return replace(tableau, c=c, a=a, b=b, quadrature=quadrature, b_error=None, first_same_as_last=False)


def pull(
    advance: Callable[[Tensor], Tensor | list[Tensor]],
    start: Tensor,
    inputs: Sequence[Tensor],
    costate: Tensor | list[Tensor],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Take a step again from ``start``: the costate there, and what reaches the inputs."""
    with torch.enable_grad():
        end = advance(start)
    found: Sequence[Tensor | None] = torch.autograd.grad(end, (start, *inputs), costate, allow_unused=True)
    return torch.zeros_like(start) if found[0] is None else found[0], found[1:]


class Layer(NamedTuple):
    """A step ``advance(x, *controls)`` with controls of its own, taken from ``start``."""

    advance: Callable[..., Tensor]
    controls: Sequence[Tensor]
    start: Tensor


def layer_step(layer: Layer, costate: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Carry the costate over a layer and read out the gradient of its controls."""
    controls = [control.detach().requires_grad_() for control in layer.controls]
    start = layer.start.detach().requires_grad_()
    x, found = pull(lambda x: layer.advance(x, *controls), start, controls, costate)
    return x, [torch.zeros_like(c) if g is None else g for c, g in zip(controls, found, strict=True)]


class DiscreteStep:
    """The step of the sweep: one accepted Runge-Kutta step, taken again and pulled back.

    Args:
        tableau: the method.
        field: the field.
        jumps: dL/dx at outputs, by their index in ``times``.
        observer: watches every evaluation.
        times: start and outputs, where dL/dtimes is wanted.
        outputs: start and outputs of a dense walk, whose steps stretch with the last of them alone.
    """

    def __init__(
        self,
        tableau: Tableau,
        field: Differentiable,
        jumps: Mapping[int, Tensor],
        observer: Observer | None = None,
        times: Sequence[float] | None = None,
        outputs: Sequence[float] = (),
    ) -> None:
        self._tableau, self._field, self._jumps = tableau, field, jumps
        self._observer, self._times, self._outputs = observer, times, outputs

    def __call__(self, replay: Replay, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of a step to its start."""
        taken, start = replay.step, replay.start.detach().requires_grad_()
        costate, interval = value.x, taken.output or value.interval
        if taken.output is not None and taken.output in self._jumps:
            costate = costate + self._jumps[taken.output]
        inside = [i for i in taken.inside if i in self._jumps]
        # Interpolation needs the slope at the end, nothing else does.
        tableau = self._tableau if inside else shortened(self._tableau)
        field, moves = self._field.noted(taken.notes, self._stages(taken, tableau)), []
        inner = self._field.noted(())
        if self._times is not None:
            moves = [_leaf(1.0, start), _leaf(0.0, start), _leaf([self._outputs[i] for i in inside], start)]
            field, inner = (_moved(f, taken.time, *moves[:2]) for f in (field, inner))
        inputs = (*self._field.parameters, *moves)

        def advance(start: Tensor) -> list[Tensor]:
            end, seen = step(tableau, field, taken.time, taken.size, start, None, inner)
            self._field.require_same(end, replay.expected, (start, *inputs))
            if not inside:
                return [end]
            stretch, shift, at = moves or (1.0, 0.0, _leaf([self._outputs[i] for i in inside], start))
            theta = (at - taken.time - shift) / (taken.size * stretch)
            return [end, interpolate(tableau, taken.size, start, seen.slopes, theta)]

        costates = [costate, *([torch.stack([self._jumps[i] for i in inside])] if inside else [])]
        x, found = pull(advance, start, inputs, costates)
        count = len(self._field.parameters)
        accumulate(value.parameters, found[:count])
        if self._times is not None:
            self._accumulate_times(value.times, taken, interval, inside, found[count:])
        return value._replace(x=x, interval=interval), None

    def _accumulate_times(
        self, total: Tensor, taken: Taken, interval: int, inside: list[int], found: Sequence[Tensor | None]
    ) -> None:
        """An interval stretches its steps and moves their starts in proportion; outputs inside move alone."""
        stretch, shift = (0.0 if v is None else v for v in found[:2])
        times, before = self._times or (), 0 if self._outputs else interval - 1
        length = times[interval] - times[before]
        stretch = stretch / length + shift * ((taken.time - times[before]) / length)
        total[interval] += stretch
        total[before] += shift - stretch
        if found[2] is not None:
            total[inside] += found[2].to(total)

    def _stages(self, taken: Taken, tableau: Tableau) -> Iterator[AbstractContextManager[Any]] | None:
        """The observer's contexts of a step's evaluations."""
        if self._observer is None:
            return None
        return map(self._observer.stage, [abs(taken.size) * w for w in tableau.quadrature], repeat(1.0))


def _leaf(values: float | Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device, requires_grad=True)


def _moved(field: Field, start: float, stretch: Tensor, shift: Tensor) -> Field:
    """The field of a step that moves by ``shift`` and grows by ``stretch``."""
    return lambda t, y: stretch.to(y.dtype) * field(t + shift + (stretch - 1.0) * (t - start), y)
