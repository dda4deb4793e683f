"""The continuous adjoint, first order: the costate equation is integrated backwards beside the path itself.

    dx/dt = F(t, x),   da/dt = -F_x^T a,   dL/dtheta = integral F_theta^T a dt

from t1 to t0, with error control of its own and memory that does not grow with the number of steps. Only (x, a) is the
state of the Runge-Kutta method; the integral over F_theta^T a is a quadrature with the method's weights over accepted
steps. The costate is integrated in units of ten times its own root mean square at the end of each interval: a tolerance
then means the same for every scaling of the loss, and the kinks that a costate inherits from ReLUs do not rule the step
size. At an output time the cotangent of the output is added to a, and x starts again from the output itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.differential.discrete import Costate, Gradient, Observer
from ocnopt.integrate.runge_kutta import Field, Time
from ocnopt.integrate.tableaus import Tableau
from ocnopt.integrate.walk import StageLog, Step, Walk


@runtime_checkable
class Integrate(Protocol):
    """A walk over one interval: grid or error control, method, tolerances and first step length bound already."""

    def __call__(
        self, field: Field, x: Tensor, times: Sequence[float], *, first: Tensor, on_step: Callable[[Step], None]
    ) -> Walk:
        """Walk from ``times[0]`` to ``times[1]``."""


class Interval(NamedTuple):
    """A stretch of the path between two output times, with the state at its end and dL/dx of an output there."""

    start: float
    end: float
    output: int
    state: Tensor
    jump: Tensor | None


class ContinuousStep:
    """The step of the sweep: the costate equation over one interval, backwards.

    Args:
        tableau: the method that ``integrate`` uses.
        integrate: walks over one interval.
        field: the field.
        moving: whether dL/dtimes is wanted.
        observer: watches accepted steps; each stage with a positive quadrature weight is evaluated once more for it,
            since a step is known to be accepted only after its last stage.
    """

    def __init__(
        self,
        tableau: Tableau,
        integrate: Integrate,
        field: Any,
        observer: Observer | None = None,
        moving: bool = False,
    ) -> None:
        self._tableau, self._integrate, self._field = tableau, integrate, field
        self._observer, self._moving = observer, moving

    def __call__(self, interval: Interval, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of an interval to its start."""
        x = value.x if interval.jump is None else value.x + interval.jump
        backward = _Backward(self._tableau, self._field, value.parameters, _unit(x), self._observer)
        state = torch.stack([interval.state, x / backward.unit])
        first = backward.field(interval.end, state)
        times = (interval.end, interval.start)
        walk = self._integrate(backward.field, state, times, first=first, on_step=backward.accept)
        start = walk.state[1] * backward.unit
        if self._moving:
            if interval.jump is not None:
                value.times[interval.output] += _dot(interval.jump, first[0])
            if interval.output == 1:
                slope = self._field.pull(interval.start, walk.state[0], start, wanted=False).slope
                value.times[0] -= _dot(start, slope)
        return Costate(start, value.parameters, value.times, interval.output), None


class _Backward:
    """The joint field of (x, a / unit) over one interval, and the quadrature for the parameters."""

    def __init__(
        self, tableau: Tableau, field: Any, gradient: Gradient, unit: float, observer: Observer | None
    ) -> None:
        self._tableau, self._pull, self._gradient = tableau, field.pull, gradient
        self.unit, self._observer = unit, observer
        self._log: StageLog[Sequence[Tensor | None]] = StageLog(tableau)
        self._wanted = [weight != 0.0 for weight in tableau.b]
        self._wanted[-1] |= tableau.first_same_as_last

    def field(self, t: Time, state: Tensor) -> Tensor:
        """Evaluate (F, -F_x^T a) and note F_theta^T a."""
        seen = self._pull(t, state[0], state[1], wanted=self._wanted[self._log.stage])
        self._log.add(seen.parameters)
        return torch.stack([seen.slope, -seen.x])

    def accept(self, step: Step) -> None:
        """Add the integral over one accepted step; its size h is negative where the path runs forwards."""
        for weight, terms in zip(self._tableau.b, self._log.accept(), strict=True):
            if weight != 0.0:
                self._gradient.add(terms, -step.size * weight * self.unit)
        if self._observer is None:
            return
        for weight, t, state in zip(self._tableau.quadrature, step.stages.times, step.stages.points, strict=True):
            if weight > 0.0:
                watch = self._observer.stage(abs(step.size) * weight, -step.size * weight)
                self._pull(t, state[0], state[1] * self.unit, watch=watch)


def _unit(x: Tensor) -> float:
    """Ten times the root mean square, one for zero."""
    return 10.0 * float(torch.linalg.vector_norm(x)) / max(1, x.numel()) ** 0.5 or 1.0


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)
