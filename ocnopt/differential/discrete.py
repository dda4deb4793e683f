"""The exact gradient of a Runge-Kutta solve: accepted steps are replayed backwards.

A step x_next = x + h sum_i b_i F(t_i, y_i) with y_i = x + h sum_{j<i} a_ij F(t_j, y_j) maps the costate p' = dL/dx_next
back by

    kbar_i = h (b_i p' + sum_{k>i} a_ki lambda_k),   lambda_i = F_y(y_i)^T kbar_i,   i = s, ..., 1
    p = p' + sum_i lambda_i,   dL/dtheta = sum_i F_theta(y_i)^T kbar_i

without divisions by b_i, so for any explicit tableau: one evaluation and one vector-Jacobian product a stage. Step
sizes count as constants; as times move, all steps of an interval scale with it, which gives gradients for times: for a
step dL/dh = sum_i (k_i / h + c_i F_t) . kbar_i and dL/dt = sum_i F_t . kbar_i.

Stage by stage this needs the stage points and lets observers watch (:class:`StagewisePull`). Where nobody watches, the
same map is one vector-Jacobian product through the whole step, which needs the state at its start alone and spares the
autograd engine s - 1 calls (:class:`WholePull`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.integrate.runge_kutta import Field, Time, step, weighted_sum
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step


@runtime_checkable
class Observer(Protocol):
    """Watches a backward pass through its own evaluations of the field."""

    def stage(self, input_weight: float, gradient_weight: float) -> AbstractContextManager[Any]:
        """Give a context around one evaluation of the field, with gradients, and its vector-Jacobian product.

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
    """One evaluation F(t, y) and its products with a cotangent: F_y^T c, F_theta^T c for each parameter, F_t . c."""

    slope: Tensor
    x: Tensor
    parameters: Sequence[Tensor | None]
    time: Tensor | None


@runtime_checkable
class Differentiable(Protocol):
    """A field that adjoints can differentiate; a note says what else an evaluation saw (random numbers)."""

    parameters: Sequence[Tensor]

    def noted(self, notes: Sequence[Any]) -> Field:
        """Return the field for a row of evaluations that see what the notes say."""

    def pull(self, t: Time, x: Tensor, cotangent: Tensor, *, wanted: bool = True, note: Any = None) -> Pull:
        """Evaluate once and pull a cotangent back, to the parameters only if they are ``wanted``."""


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


class Replay(NamedTuple):
    """One accepted step, ready to be walked backwards; ``points`` holds as many stage points as were asked for."""

    time: float
    size: float
    points: list[Tensor]
    notes: Sequence[Any]
    output: int | None


class Trajectory:
    """The accepted steps of a solve, for walking backwards.

    The first ``depth`` stage points of every step are kept until ``budget`` bytes are full. From then on only every
    stride-th state is kept, stride about the square root of the number of steps, and each stretch is recomputed, bit
    for bit, when the backward walk reaches it.

    Args:
        tableau: the method.
        depth: how many stage points the backward walk needs; one is the state at the start of the step.
        budget: bytes to keep.
        field: takes the steps again.
        log: notes of the evaluations, where the field needs them to be repeated.
    """

    def __init__(
        self, tableau: Tableau, depth: int, budget: int, field: Differentiable, log: StageLog[Any] | None = None
    ) -> None:
        self._tableau, self._depth, self._budget, self._field, self._log = tableau, depth, budget, field, log
        self._unnoted = (None,) * len(tableau.c)
        self._steps: list[Replay] = []
        self._points: dict[int, list[Tensor]] = {}
        self._kept: list[tuple[int, int]] = []
        self._bytes, self._stride = 0, 0

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, step: Step) -> None:
        """Keep one accepted step."""
        i, points = len(self._steps), step.stages.points[: self._depth]
        notes = self._unnoted if self._log is None else self._log.accept()
        self._steps.append(Replay(step.time, step.size, [], notes, step.output))
        if not self._stride:
            self._points[i] = points
            self._bytes += sum(point.numel() * point.element_size() for point in points)
        elif i % self._stride == 0:
            self._points[i] = points[:1]
        if self._bytes > self._budget:
            self._thin()

    def _thin(self) -> None:
        """Keep one state per stride, at most twice as many as a stride has steps."""
        stride = max(1, self._stride)
        while len(self._steps) > 2 * stride**2:
            stride *= 2
        if stride != self._stride:
            self._stride = stride
            self._points = {i: points[:1] for i, points in self._points.items() if i % stride == 0}

    def release(self) -> list[Tensor]:
        """Hand over the tensors that are kept, so that autograd owns them."""
        self._kept = [(i, len(points)) for i, points in self._points.items()]
        tensors = [point for points in self._points.values() for point in points]
        self._points = {}
        return tensors

    def restore(self, tensors: Iterable[Tensor]) -> None:
        """Take back what :meth:`release` handed over."""
        following = iter(tensors)
        self._points = {i: list(islice(following, count)) for i, count in self._kept}

    def __iter__(self) -> Iterator[Replay]:
        yield from [*reversed(self)][::-1]

    def __reversed__(self) -> Iterator[Replay]:
        end = len(self._steps)
        for start in sorted(self._points, reverse=True):
            stretch = [self._points[start]] if not self._stride else self._retaken(start, end)
            for i in range(end - 1, start - 1, -1):
                yield self._steps[i]._replace(points=stretch[i - start])
            end = start

    def _retaken(self, start: int, end: int) -> list[list[Tensor]]:
        """Stage points of the steps from ``start`` up to ``end``."""
        x, first, stretch = self._points[start][0], None, []
        for taken in self._steps[start:end]:
            field = self._field.noted(taken.notes[first is not None :])
            x, seen = step(self._tableau, field, taken.time, taken.size, x, first)
            first = seen.slopes[-1] if self._tableau.first_same_as_last else None
            stretch.append(seen.points[: self._depth])
        return stretch


@cache
def shortened(tableau: Tableau) -> Tableau:
    """The method without a last stage that serves the next step alone: nothing flows back through it."""
    if not tableau.first_same_as_last:
        return tableau
    c, a, b, quadrature = tableau.c[:-1], tableau.a[:-1], tableau.b[:-1], tableau.quadrature[:-1]
    return replace(tableau, c=c, a=a, b=b, quadrature=quadrature, b_error=None, first_same_as_last=False)


class PulledStep(NamedTuple):
    """The costate at the start of a step, and dL/dh, dL/dt of the step where they are wanted."""

    x: Tensor
    size: Tensor | None = None
    time: Tensor | None = None


PullStep = Callable[[Replay, Tensor, Gradient], PulledStep]


class WholePull:
    """The vector-Jacobian product of one step by autograd through the step; it needs the first stage point alone.

    Args:
        tableau: the method, see :func:`shortened`.
        field: the field.
    """

    def __init__(self, tableau: Tableau, field: Differentiable) -> None:
        self._tableau, self._field = tableau, field

    def __call__(self, replay: Replay, costate: Tensor, gradient: Gradient) -> PulledStep:
        """Map the costate at the end of a step to its start, and add to the gradient."""
        leaf = replay.points[0].detach().requires_grad_()
        with torch.enable_grad():
            x, _ = step(self._tableau, self._field.noted(replay.notes), replay.time, replay.size, leaf)
        x_bar, *terms = torch.autograd.grad(x, (leaf, *self._field.parameters), costate, allow_unused=True)
        gradient.add(terms)
        return PulledStep(x_bar)


class StagewisePull:
    """The stage adjoint of one step: the one that observers can watch, and that knows dL/dh and dL/dt.

    Args:
        tableau: the method, see :func:`shortened`.
        field: the field.
        observer: watches every stage.
        moving: whether dL/dh and dL/dt are wanted.
    """

    def __init__(
        self, tableau: Tableau, field: Differentiable, observer: Observer | None = None, moving: bool = False
    ) -> None:
        self._columns, self._c, self._quadrature = _columns(tableau), tableau.c, tableau.quadrature
        self._pull, self._moving = field.pull, moving
        self._watch = _unwatched if observer is None else observer.stage

    def __call__(self, replay: Replay, costate: Tensor, gradient: Gradient) -> PulledStep:
        """Map the costate at the end of a step to its start, and add to the gradient."""
        h, reverse, total = replay.size, [costate], costate.clone()
        size = time = costate.new_zeros((), dtype=torch.float64) if self._moving else None
        for i, column in self._columns:
            kbar = weighted_sum(h, column, reverse)
            with self._watch(abs(h) * self._quadrature[i], 1.0):
                seen = self._pull(replay.time + self._c[i] * h, replay.points[i], kbar, note=replay.notes[i])
            reverse.append(seen.x)
            total += seen.x
            gradient.add(seen.parameters)
            if size is not None and time is not None:
                shift = torch.zeros_like(time) if seen.time is None else seen.time.double()
                size = size + (seen.slope * kbar).sum(dtype=torch.float64) / h + self._c[i] * shift
                time = time + shift
        return PulledStep(total, size, time)


class DiscreteStep:
    """The step of the sweep: one accepted Runge-Kutta step backwards.

    Args:
        pull_step: the vector-Jacobian product of a step.
        jumps: dL/dx at outputs before the end, by their index in ``times``.
        times: start and outputs, where dL/dtimes is wanted.
    """

    def __init__(self, pull_step: PullStep, jumps: Mapping[int, Tensor], times: Sequence[float] = ()) -> None:
        self._pull_step, self._jumps, self._times = pull_step, jumps, times

    def __call__(self, replay: Replay, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of a step to its start."""
        x, interval = value.x, value.interval
        if replay.output is not None:
            interval = replay.output
            x = x + self._jumps[interval] if interval in self._jumps else x
        pulled = self._pull_step(replay, x, value.parameters)
        if pulled.size is not None and pulled.time is not None:
            # An interval stretches its steps and moves their starts in proportion.
            start, length = self._times[interval - 1], self._times[interval] - self._times[interval - 1]
            stretch = pulled.size * (replay.size / length) + pulled.time * ((replay.time - start) / length)
            value.times[interval] += stretch
            value.times[interval - 1] += pulled.time - stretch
        return Costate(pulled.x, value.parameters, value.times, interval), None


@cache
def _columns(tableau: Tableau) -> list[tuple[int, tuple[float, ...]]]:
    """For i = s, ..., 1 the weights (b_i, a_{s,i}, ..., a_{i+1,i}) of p', lambda_s, ..., lambda_{i+1}."""
    stages = range(len(tableau.c))
    return [(i, (tableau.b[i], *(tableau.a[k][i] for k in reversed(stages[i + 1 :])))) for i in reversed(stages)]


_NOBODY = nullcontext()


def _unwatched(input_weight: float, gradient_weight: float) -> AbstractContextManager[Any]:
    return _NOBODY
