"""Move a unicycle one metre sideways, which it cannot do directly: forward, turn, back, soft terminal cost.

Shapes: x = (x, y, heading) ``(..., 3)``, u = (speed, turn rate) ``(..., 2)``; the wheel rolls along its heading, the x
axis at the start and at the end.

Standing still is a stationary point (cost 100), since no small motion leads sideways; the way that begins forwards
and its mirror image, which begins backwards, cost the same. The registry starts with a forward swing and a turn,
rolled out.

Source: the constraint of Brockett, "Asymptotic stability and feedback stabilization", 1983; costs computed here.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import GOAL, INK, Axes, Drawing, box, shape
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: x' = v cos(heading), y' = v sin(heading), heading' = turn rate."""
    heading, speed, turn = x[..., 2], u[..., 0], u[..., 1]
    return torch.stack([speed * torch.cos(heading), speed * torch.sin(heading), turn], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """speed^2 + turn rate^2."""
    return (u**2).sum(-1)


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """100 (x^2 + y^2 + heading^2)."""
    return 100 * (x**2).sum(-1)


def start(steps: int) -> Mapping[str, Tensor]:
    """Forwards and back again, turning left and right half a period later."""
    phase = 2 * math.pi * torch.arange(steps, dtype=torch.float64) / steps
    return {"controls": torch.stack([torch.cos(phase), -torch.sin(phase)], dim=-1)}


def build(*, initial_state: Any = (0.0, 1.0, 0.0), horizon: float = 4.0) -> OCP:
    """The problem from another initial state ``(*batch, 3)`` or over another horizon."""
    return OCP(
        dynamics,
        running_cost,
        terminal_cost,
        initial_state=initial_state,
        control_dim=2,
        horizon=horizon,
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """A wheel from above on its plate, which points forwards."""
    place, heading = state[:2].tolist(), float(state[2])
    shape(axes, [(-0.12, -0.09), (0.1, -0.09), (0.19, 0.0), (0.1, 0.09), (-0.12, 0.09)], place, heading)
    shape(axes, box(0.16, 0.035), place, heading, INK)


def _goal(axes: Axes) -> None:
    corners = [(-0.12, -0.09), (0.1, -0.09), (0.19, 0.0), (0.1, 0.09), (-0.12, 0.09)]
    shape(axes, corners, (0.0, 0.0), 0.0, "none", edgecolor=GOAL, lw=2.0, zorder=3)


RECORD = ControlRecord(
    name="unicycle_parking",
    summary="move a unicycle one metre sideways by driving and turning",
    build=build,
    source="collocation at 5 Legendre points a step with a control at each, 10, 20 and 40 steps; DDP and IPOPT with "
    "constant controls tend to it; 20 random starts give one minimum",
    optimal_cost=2.76705066729,
    tolerance=1e-10,
    start="controls (cos, -sin) over one period, rolled out",
    discrete_values={50: 2.769686374, 100: 2.7677090145},
    state_labels=("x (m)", "y (m)", "heading (rad)"),
    control_labels=("speed (m/s)", "turn rate (rad/s)"),
    drawing=Drawing(_frame, _goal, lambda times, states: states[:, :2], x="x (m)", y="y (m)"),
)
