"""Swing a pole up by pushing the cart it hangs from, soft terminal cost, no bounds.

Shapes: x = (position, theta, velocity, omega) ``(..., 4)``, u = force on the cart ``(..., 1)``; theta = 0 hangs, theta
= pi is upright. Cart 1 kg, point mass 0.1 kg on a massless pole of 0.5 m.

At rest with u = 0 the gradient is zero (cost 208). There are many local minima: a constant force of 0.1, rolled out,
leads to the second one. The registry starts from a guess of the states, theta on a line from 0 to pi within the first
half of the horizon, from which DDP and IPOPT find the best known minimum with 100 and with 500 steps. (The line over
the whole horizon does as well with 100 steps; with 500, IPOPT falls into 6.729.)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import FIXED, GOAL, INK, Axes, Drawing, arrow, box, dot, line, shape
from ocnopt.problems.record import ControlRecord

CART, POLE, LENGTH, GRAVITY = 1.0, 0.1, 0.5, 9.81


def dynamics(t: Tensor, x: Tensor, u: Tensor, pole: float = POLE) -> Tensor:
    """Equations of motion of Kelly 2017 (SIAM Review 59), appendix E, point mass ``pole`` at the tip."""
    theta, velocity, omega, force = x[..., 1], x[..., 2], x[..., 3], u[..., 0]
    s, c = torch.sin(theta), torch.cos(theta)
    mass = CART + pole * s**2
    swing = LENGTH * pole * s * omega**2
    acceleration = (swing + force + pole * GRAVITY * c * s) / mass
    angular = -(swing * c + force * c + (CART + pole) * GRAVITY * s) / (LENGTH * mass)
    return torch.stack([velocity, omega, acceleration, angular], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """0.1 position^2 + (1 + cos theta) + 0.01 (velocity^2 + omega^2) + 0.01 u^2."""
    rates = x[..., 2] ** 2 + x[..., 3] ** 2
    return 0.1 * x[..., 0] ** 2 + (1 + torch.cos(x[..., 1])) + 0.01 * rates + 0.01 * u[..., 0] ** 2


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """100 (position^2 + 1 + cos theta) + 10 (velocity^2 + omega^2)."""
    return 100 * (x[..., 0] ** 2 + 1 + torch.cos(x[..., 1])) + 10 * (x[..., 2] ** 2 + x[..., 3] ** 2)


def start(steps: int) -> Mapping[str, Tensor]:
    """Guess theta on a line from hanging to upright within half of the horizon, everything else zero."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    states = torch.zeros(steps + 1, 4, dtype=torch.float64)
    states[:, 1] = math.pi * (2 * share).clamp(max=1)
    return {"states": states, "controls": torch.zeros(steps, 1, dtype=torch.float64)}


def build(*, initial_state: Any = (0.0, 0.0, 0.0, 0.0), horizon: float = 4.0) -> OCP:
    """The problem from another initial state ``(*batch, 4)`` or over another horizon."""
    return OCP(
        dynamics,
        running_cost,
        terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """Cart, pole, and the force on the cart."""
    place, theta = state[:2].tolist()
    tip = (place + LENGTH * math.sin(theta), -LENGTH * math.cos(theta))
    shape(axes, box(0.3, 0.14), (place, 0.0))
    line(axes, [(place, 0.0), tip], INK, 2.5)
    dot(axes, tip, size=10.0)
    arrow(axes, (place, 0.13), (0.04 * float(control[0]), 0.0), 0.06)


def _tip(times: Tensor, states: Tensor) -> Tensor:
    """The path of the point mass."""
    place, theta = states[:, 0], states[:, 1]
    return torch.stack([place + LENGTH * torch.sin(theta), -LENGTH * torch.cos(theta)], dim=-1)


def drawing(goal: float) -> Drawing:
    """A cart on its rail, which is to end under a pole at ``goal``."""

    def rail(axes: Axes) -> None:
        axes.axhline(-0.085, color=FIXED, lw=1.5)
        dot(axes, (goal, LENGTH), GOAL, 15.0, fillstyle="none", zorder=1)

    return Drawing(_frame, rail, _tip)


RECORD = ControlRecord(
    name="cartpole_swing_up_soft",
    summary="swing a pole up by pushing its cart, many local minima",
    build=build,
    source="orthogonal collocation of degree 4-5 with IPOPT at 1e-11, mesh refined until stable, best of 16 starts",
    optimal_cost=2.6277086651,
    tolerance=1e-9,
    start="states: theta linear from 0 to pi within the first half, everything else 0; controls 0",
    discrete_values={100: 2.6313393299, 500: 2.6278533266},
    other_minima=(3.87479, 5.15469, 6.7287, 9.07675),
    state_labels=("position (m)", "angle (rad)", "velocity (m/s)", "angular velocity (rad/s)"),
    control_labels=("force (N)",),
    drawing=drawing(goal=0.0),
)
