"""A mass brought to rest at the origin in discrete time: exact steps of 0.1 s, a sum of costs without the factor h.

Shapes: x = (p, v) ``(..., 2)``, u ``(..., 1)``, N = 50 steps. The discrete Riccati recursion gives cost and gains; the
first gain is K0 = (2.58576128, 3.44345644) in u = -K x.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.problems.drawing import mass_on_rail
from ocnopt.problems.record import ControlRecord
from ocnopt.staged import Stage, StagedOCP

STEP = 0.1


def dynamics(k: int | Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The state after one step under a constant force."""
    p, v, force = x[..., 0], x[..., 1], u[..., 0]
    return torch.stack([p + STEP * v + STEP**2 / 2 * force, v + STEP * force], dim=-1)


def cost(k: int | Tensor, x: Tensor, u: Tensor) -> Tensor:
    """p^2 + v^2 + 0.1 u^2."""
    return (x**2).sum(-1) + 0.1 * u[..., 0] ** 2


def terminal_cost(x: Tensor) -> Tensor:
    """10 (p^2 + v^2)."""
    return 10 * (x**2).sum(-1)


def build(*, initial_state: Any = (1.0, 0.0), steps: int = 50) -> StagedOCP:
    """The problem from another initial state ``(*batch, 2)`` or with another number of steps."""
    return StagedOCP(Stage(dynamics, cost, control_dim=1), terminal_cost, steps=steps, initial_state=initial_state)


RECORD = ControlRecord(
    name="discrete_lqr_double_integrator",
    summary="bring a mass to rest at the origin, in discrete time",
    build=build,
    source="discrete Riccati recursion",
    optimal_cost=13.31743275051076,
    tolerance=1e-11,
    start="controls 0, rolled out",
    steps=50,
    discrete_values={50: 13.31743275051076},
    state_labels=("position (m)", "velocity (m/s)"),
    control_labels=("force (N)",),
    drawing=mass_on_rail(force=0.06),
)
