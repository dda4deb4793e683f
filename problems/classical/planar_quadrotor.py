"""A quadrotor seen from the side flies three metres along and one up, at rest at both ends: least effort, least time.

Shapes: x = (x, y, theta, vx, vy, omega) ``(..., 6)``, u = (right, left) thrust of the two rotors ``(..., 2)``; theta is
the tilt, counter-clockwise. Mass 1 kg, inertia 0.02 kg m^2, rotors 0.25 m from the centre, g = 9.81 m/s^2. Thrusts are
between 0 and 8 N, which least effort does not touch; least time is mostly bang-bang with interior (singular) pieces.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP, FreeHorizon, Horizon
from ocnopt.problems.drawing import GOAL, INK, Axes, Drawing, arrow, box, dot, shape
from ocnopt.problems.record import ControlRecord

MASS, INERTIA, ARM, GRAVITY = 1.0, 0.02, 0.25, 9.81
HOVER, THRUST_LIMIT, TARGET = MASS * GRAVITY / 2, 8.0, (3.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Both thrusts push along the body's upward axis; their difference turns it."""
    theta, lift = x[..., 2], (u[..., 0] + u[..., 1]) / MASS
    turn = ARM * (u[..., 0] - u[..., 1]) / INERTIA
    slopes = [-lift * torch.sin(theta), lift * torch.cos(theta) - GRAVITY, turn]
    return torch.cat([x[..., 3:], torch.stack(slopes, dim=-1)], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Squared distance of the thrusts from those that hover."""
    return ((u - HOVER) ** 2).sum(-1)


def end_time(t: Tensor, x: Tensor) -> Tensor:
    """The end time."""
    return t


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """At the target, level and at rest."""
    return x - x.new_tensor(TARGET)


def start(steps: int) -> Mapping[str, Tensor]:
    """Hovering thrusts; the states on a line to the target."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    states = share * torch.tensor(TARGET, dtype=torch.float64)
    return {"states": states, "controls": torch.full((steps, 2), HOVER, dtype=torch.float64)}


def build(*, initial_state: Any = (0.0,) * 6, horizon: float | Horizon | FreeHorizon = 2.0) -> OCP:
    """The problem from another initial state ``(*batch, 6)``; a ``FreeHorizon`` asks for least time."""
    free = isinstance(horizon, FreeHorizon)
    return OCP(
        dynamics,
        None if free else running_cost,
        end_time if free else None,
        initial_state=initial_state,
        control_dim=2,
        horizon=horizon,
        control_bounds=(0.0, THRUST_LIMIT),
        terminal_constraint=terminal_constraint,
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """A bar with two rotors, and their thrusts."""
    x, y, theta = state[:3].tolist()
    c, s = math.cos(theta), math.sin(theta)
    shape(axes, box(2 * ARM, 0.04), (x, y), theta, INK)
    shape(axes, box(0.14, 0.1), (x, y), theta)
    for side, thrust in zip((ARM, -ARM), control.tolist(), strict=True):
        hub = (x + c * side, y + s * side)
        shape(axes, box(0.2, 0.02, (0.0, 0.05)), hub, theta)
        arrow(axes, (hub[0] - 0.07 * s, hub[1] + 0.07 * c), (-0.04 * thrust * s, 0.04 * thrust * c), 0.06, width=1.5)


def _goal(axes: Axes) -> None:
    dot(axes, TARGET[:2], GOAL, 30.0, fillstyle="none", zorder=1)


_DRAWING = Drawing(_frame, _goal, lambda times, states: states[:, :2], x="x (m)", y="y (m)")
_STATES = ("x (m)", "y (m)", "tilt (rad)", "x velocity (m/s)", "y velocity (m/s)", "tilt rate (rad/s)")
_CONTROLS = ("right thrust (N)", "left thrust (N)")

RECORD_ENERGY = ControlRecord(
    name="planar_quadrotor_energy",
    summary="fly a planar quadrotor from rest to rest with least effort",
    build=build,
    source="orthogonal collocation of degree 4-5 with IPOPT at 1e-11, mesh refined until stable",
    optimal_cost=1.230483402,
    tolerance=1e-9,
    discrete_values={50: 1.2351821627, 100: 1.2316537412},
    start="states on a line to the target; hovering thrusts",
    state_labels=_STATES,
    control_labels=_CONTROLS,
    drawing=_DRAWING,
)

RECORD_MIN_TIME = ControlRecord(
    name="planar_quadrotor_min_time",
    summary="the same flight as fast as bounded thrusts allow",
    build=partial(build, horizon=FreeHorizon(initial=2.0, lower=0.5, upper=5.0)),
    source="collocation with 200 to 4000 steps: 1.2652509, 1.2652493 and no change from 800 on",
    optimal_cost=1.265249,
    tolerance=5e-7,
    start="states on a line to the target; hovering thrusts; T = 2 s",
    steps=300,
    T_star=1.265249,
    discrete_values={100: 1.2658205772, 300: 1.2652729064},
    state_labels=_STATES,
    control_labels=_CONTROLS,
    drawing=_DRAWING,
)
