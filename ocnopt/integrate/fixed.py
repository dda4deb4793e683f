"""A walk on a fixed grid: every interval between two times is cut into equal steps."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ocnopt.checks import times_in_order
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.integrate.events import Watch
from ocnopt.integrate.runge_kutta import Field, Outputs, Take, closed, step
from ocnopt.integrate.tableaus import RK4, Tableau
from ocnopt.integrate.walk import NOTHING, OnStep, Step, Walk


def integrate(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    step_size: float,
    tableau: Tableau = RK4,
    first: Tensor | None = None,
    on_step: OnStep | None = None,
    take: Take = step,
    dense: bool = False,
    watch: Watch | None = None,
) -> Walk:
    """Integrate dx/dt = F(t, x) from ``times[0]`` through ``times[1:]`` in equal steps no longer than ``step_size``.

    Args:
        field: ``field(t, x)`` with t a float, shaped like x.
        x: the state at ``times[0]``, one tensor of any shape; a graph that it carries is continued.
        times: start and outputs, in either direction.
        step_size: longest step, a positive length; each interval is cut into the least number of equal steps.
        tableau: any explicit method.
        first: F at the start, where it is known already.
        on_step: called with every :class:`~ocnopt.integrate.walk.Step`.
        take: takes each step.
        dense: cut the way from the first to the last time as one interval and interpolate the times
            between, by the closed method.
        watch: ends the walk where its event is met.

    Raises:
        ProblemError: the times or the step size make no grid.
        NonFiniteError: the path left the finite numbers.

    >>> walk = integrate(lambda t, x: -x, torch.ones(1, dtype=torch.float64), (0.0, 1.0), step_size=0.01)
    >>> walk.steps, walk.evaluations, bool(abs(walk.state[0] - math.exp(-1.0)) < 1e-10)
    (100, 400, True)
    """
    times_in_order(times)
    if not (math.isfinite(step_size) and step_size > 0):
        raise ProblemError(f"step_size is {step_size}; expected a positive length of time")
    tableau = closed(tableau) if dense or watch is not None else tableau
    if watch is not None:
        watch.start()
    outputs = Outputs(times, tableau, dense)
    slope, steps, evaluations = first, 0, 0
    for start, end in pairwise((times[0], *outputs.stops)):
        count = max(1, math.ceil(abs(end - start) / step_size - 1e-6))
        h, t = (end - start) / count, start
        for i in range(count):
            evaluations += len(tableau.c) - (slope is not None)
            before, arrived = x, i == count - 1
            x, seen = take(tableau, field, t, h, before, slope)
            cut = None if watch is None else watch.length(tableau, field, t, h, before, seen)
            if cut is not None:
                h, arrived = cut, True
                x, seen = take(tableau, field, t, h, before, seen.slopes[0])
            slope = seen.slopes[-1] if tableau.first_same_as_last else None
            inside = outputs.inside(t, h, arrived) if dense or arrived else NOTHING
            if on_step is not None:
                on_step(Step(t, h, seen, inside.stop if arrived else None, x, inside))
            if dense or arrived:
                outputs.add(t, h, x, seen, inside, arrived)
            steps, t = steps + 1, t + h
            if cut is not None:
                return Walk(outputs.states, slope, step_size, steps, 0, evaluations, t)
        _require_finite(x, start, end, h)
    return Walk(outputs.states, slope, step_size, steps, 0, evaluations, times[-1])


def _require_finite(x: Tensor, start: float, end: float, h: float) -> None:
    # The sum is finite if all are, and quick; it may overflow by itself.
    if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x.detach()).all()):
        raise NonFiniteError(
            f"the state became NaN or infinite between t = {start:.6g} and t = {end:.6g}, in steps of {h:.3g}; "
            "expected a finite path: the field overflows or leaves its domain, or the steps are too long for it (more "
            "steps, or an adaptive method such as dopri5)"
        )
