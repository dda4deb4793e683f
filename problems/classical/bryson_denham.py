"""Turn a mass round within a given distance: it comes in with unit speed and must leave with it, p <= 1/9 all along.

Shapes: x = (p, v) ``(..., 2)``, u ``(..., 1)``. The mass brakes, rests against the limit for 1/3 <= t <= 2/3, and
speeds up again; the cost is 4 / (9 l) for limits l <= 1/6, 2 + 6 (1 - 4 l)^2 up to 1/4, and 2 beyond.

Source: Bryson and Ho, Applied Optimal Control, 1975, section 3.11.
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
    return u[..., 0] ** 2 / 2


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """p(1) = 0, v(1) = -1."""
    return torch.stack([x[..., 0], x[..., 1] + 1], dim=-1)


def build(*, initial_state: Any = (0.0, 1.0), limit: float = 1 / 9) -> OCP:
    """The problem from another initial state ``(*batch, 2)`` or with another limit on p."""
    return OCP(
        dynamics,
        running_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=1.0,
        path_constraint=lambda t, x, u: x[..., :1] - limit,
        terminal_constraint=terminal_constraint,
    )


RECORD = ControlRecord(
    name="bryson_denham",
    summary="turn a mass round within a given distance, a state limit",
    build=build,
    source="analytic, 4 / (9 l) with l = 1/9; collocation gives 4.0000000",
    optimal_cost=4.0,
    tolerance=1e-8,
    start="controls 0, rolled out",
    discrete_values={60: 4.0025031289, 90: 4.0011117288},
    state_labels=("position (m)", "velocity (m/s)"),
    control_labels=("force (N)",),
    drawing=mass_on_rail(wall=1 / 9, size=0.012, force=0.006),
)
