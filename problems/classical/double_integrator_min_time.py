"""Move a unit mass by one metre in the shortest time with a force of at most one newton, at rest at both ends.

Shapes: x = (p, v) ``(..., 2)``, u ``(..., 1)``, T free. Full thrust, full brake, switch half-way: T = 2. An even
number of steps has the switch on its grid, so that the discrete problem has the same answer.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.problems.drawing import mass_on_rail
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: p' = v, v' = u."""
    return torch.stack([x[..., 1], u[..., 0]], dim=-1)


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """The end time."""
    return t


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """p(T) = 1, v(T) = 0."""
    return torch.stack([x[..., 0] - 1, x[..., 1]], dim=-1)


def build(*, initial_state: Any = (0.0, 0.0), force_limit: float = 1.0) -> OCP:
    """The problem from another initial state ``(*batch, 2)`` or with another bound on the force."""
    return OCP(
        dynamics,
        terminal_cost=terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=FreeHorizon(initial=1.0, lower=0.1, upper=10.0),
        control_bounds=(-force_limit, force_limit),
        terminal_constraint=terminal_constraint,
    )


RECORD = ControlRecord(
    name="double_integrator_min_time",
    summary="move a mass by 1 m as fast as a bounded force allows",
    build=build,
    source="analytic, bang-bang with the switch at t = 1",
    optimal_cost=2.0,
    tolerance=1e-10,
    start="controls 0, T = 1",
    T_star=2.0,
    discrete_values={50: 2.0, 100: 2.0},
    state_labels=("position (m)", "velocity (m/s)"),
    control_labels=("force (N)",),
    drawing=mass_on_rail(goal=1.0, force=0.2),
)
