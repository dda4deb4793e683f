"""The curve of fastest descent: a bead slides without friction from rest at (0, 0) to (10, 5), y pointing down.

Shapes: x = (x, y, v) ``(..., 3)``, u = angle of the path from the vertical ``(..., 1)``, T free. The optimum is a
cycloid.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.problems.drawing import FIXED, GOAL, Axes, Drawing, dot, line
from ocnopt.problems.record import ControlRecord

GRAVITY, TARGET = 9.80665, (10.0, 5.0)


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: x' = v sin(angle), y' = v cos(angle), v' = g cos(angle)."""
    speed, s, c = x[..., 2], torch.sin(u[..., 0]), torch.cos(u[..., 0])
    return torch.stack([speed * s, speed * c, GRAVITY * c], dim=-1)


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """The end time."""
    return t


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """The bead arrives; its speed is free."""
    return torch.stack([x[..., 0] - TARGET[0], x[..., 1] - TARGET[1]], dim=-1)


def start(steps: int) -> Mapping[str, Any]:
    """A straight slide to the target that gains speed evenly."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    speed = math.sqrt(2 * GRAVITY * TARGET[1])
    angle = math.atan2(*TARGET)
    states = torch.stack([TARGET[0] * share**2, TARGET[1] * share**2, speed * share], dim=-1)
    return {"states": states, "controls": torch.full((steps, 1), angle, dtype=torch.float64)}


def build(*, initial_state: Any = (0.0, 0.0, 0.0)) -> OCP:
    """The problem from another initial state ``(*batch, 3)``."""
    return OCP(
        dynamics,
        terminal_cost=terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=FreeHorizon(initial=2.0, lower=0.5, upper=10.0),
        terminal_constraint=terminal_constraint,
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The bead."""
    dot(axes, (float(state[0]), -float(state[1])), size=12.0)


def _ends(axes: Axes) -> None:
    line(axes, [(0.0, 0.0), (TARGET[0], -TARGET[1])], FIXED, 0.8, ls=":")
    dot(axes, (TARGET[0], -TARGET[1]), GOAL, 17.0, fillstyle="none", zorder=1)


def _curve(times: Tensor, states: Tensor) -> Tensor:
    return torch.stack([states[:, 0], -states[:, 1]], dim=-1)


RECORD = ControlRecord(
    name="brachistochrone",
    summary="the curve of fastest descent, a cycloid",
    build=build,
    source="cycloid with 30-digit root finding; collocation agrees to 2e-12",
    optimal_cost=1.801603122453081,
    tolerance=1e-10,
    start="states on the straight line to the target; angle constant; T = 2 s",
    T_star=1.801603122453081,
    discrete_values={50: 1.801695535714, 100: 1.801626222739},
    state_labels=("x (m)", "y, downwards (m)", "speed (m/s)"),
    control_labels=("angle from the vertical (rad)",),
    drawing=Drawing(_frame, _ends, _curve, x="x (m)", y="height (m)", instants=9),
)
