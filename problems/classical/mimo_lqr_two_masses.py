"""Two coupled, damped masses with a force on each: linear dynamics, quadratic cost.

Shapes: x = (p1, p2, v1, v2) ``(..., 4)``, u = (f1, f2) ``(..., 2)``. Costs carry no factor 1/2.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import FIXED, INK, Axes, Drawing, arrow, box, line, shape
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Springs to the walls and between the masses (stiffness 1), damping 0.2, damping coupling 0.1, unit masses."""
    p1, p2, v1, v2 = x[..., 0], x[..., 1], x[..., 2], x[..., 3]
    a1 = -2 * p1 + p2 - 0.2 * v1 + 0.1 * v2 + u[..., 0]
    a2 = p1 - 2 * p2 + 0.1 * v1 - 0.2 * v2 + u[..., 1]
    return torch.stack([v1, v2, a1, a2], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Quadratic: x' diag(1, 2, 0.1, 0.1) x + u' diag(0.5, 0.2) u."""
    state = x[..., 0] ** 2 + 2 * x[..., 1] ** 2 + 0.1 * x[..., 2] ** 2 + 0.1 * x[..., 3] ** 2
    return state + 0.5 * u[..., 0] ** 2 + 0.2 * u[..., 1] ** 2


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """Quadratic: x' diag(10, 10, 1, 1) x."""
    return 10 * x[..., 0] ** 2 + 10 * x[..., 1] ** 2 + x[..., 2] ** 2 + x[..., 3] ** 2


def build(*, initial_state: Any = (1.0, -0.5, 0.0, 0.5), horizon: float = 4.0) -> OCP:
    """The problem from another initial state ``(*batch, 4)`` or over another horizon."""
    return OCP(dynamics, running_cost, terminal_cost, initial_state=initial_state, control_dim=2, horizon=horizon)


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """Masses at rest at 2 and 4, walls at 0 and 6, springs between."""
    places = [0.0, 2 + float(state[0]), 4 + float(state[1]), 6.0]
    for left, right in itertools.pairwise(places):
        reach = right - left
        coil = [(left + reach * (0.2 + 0.06 * i), 0.1 * (-1) ** i if 0 < i < 10 else 0.0) for i in range(11)]
        line(axes, [(left, 0.0), *coil, (right, 0.0)], INK, 1.0)
    for place, force in zip(places[1:3], control.tolist(), strict=True):
        shape(axes, box(0.5, 0.5), (place, 0.0), zorder=3)
        arrow(axes, (place, 0.45), (0.5 * force, 0.0), 0.15)


def _walls(axes: Axes) -> None:
    for place in (0.0, 6.0):
        line(axes, [(place, -0.5), (place, 0.5)], FIXED, 3.0)


RECORD = ControlRecord(
    name="mimo_lqr_two_masses",
    summary="two coupled masses, a force on each, quadratic cost",
    build=build,
    source="Riccati equation by the matrix exponential of the Hamiltonian matrix; collocation agrees to 2e-12",
    optimal_cost=1.4799969151196526,
    tolerance=1e-11,
    start="controls 0, rolled out",
    discrete_values={50: 1.480973784374, 100: 1.480240969149},
    state_labels=("position 1 (m)", "position 2 (m)", "velocity 1 (m/s)", "velocity 2 (m/s)"),
    control_labels=("force 1 (N)", "force 2 (N)"),
    drawing=Drawing(_frame, _walls),
)
