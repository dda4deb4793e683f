"""Move a unit mass by one metre in one second, at rest at both ends, with the least integral of u^2 / 2.

Shapes: x = (p, v) ``(..., 2)``, u ``(..., 1)``. The optimum is u(t) = 6 - 12 t with cost 6.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import mass_on_rail
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: p' = v, v' = u."""
    return torch.stack([x[..., 1], u[..., 0]], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """u^2 / 2."""
    return 0.5 * u[..., 0] ** 2


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """p(T) = 1, v(T) = 0."""
    return torch.stack([x[..., 0] - 1, x[..., 1]], dim=-1)


def build(*, initial_state: Any = (0.0, 0.0), horizon: float = 1.0) -> OCP:
    """The problem from another initial state ``(*batch, 2)`` or over another horizon."""
    return OCP(
        dynamics,
        running_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        terminal_constraint=terminal_constraint,
    )


RECORD = ControlRecord(
    name="double_integrator_min_energy",
    summary="move a mass by 1 m in 1 s with least effort",
    build=build,
    source="analytic, u(t) = 6 - 12 t; with controls constant on N steps 6 / (1 - 1/N^2)",
    optimal_cost=6.0,
    tolerance=1e-10,
    start="controls 0, rolled out",
    discrete_values={steps: 6 / (1 - steps**-2) for steps in (10, 50, 100)},
    state_labels=("position (m)", "velocity (m/s)"),
    control_labels=("force (N)",),
    drawing=mass_on_rail(goal=1.0, force=0.05),
)
