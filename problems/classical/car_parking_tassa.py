"""Park a car whose steering and acceleration are bounded, a problem in discrete time.

From Tassa, Mansard and Todorov, "Control-limited differential dynamic programming", ICRA 2014.

Shapes: x = (x, y, heading, speed) ``(..., 4)``, u = (steering angle, acceleration) ``(..., 2)``, N steps of 0.03 s.
The cost is a sum over steps without the factor h. There are at least twelve minima; from u = 0 solvers end in 1.90517.
The registry starts with the wheels held at -0.3 rad while the car speeds up and brakes again over one sine wave,
rolled out, which leads to the best known minimum.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocnopt.problems.drawing import FIXED, GOAL, INK, Axes, Drawing, box, shape
from ocnopt.problems.record import ControlRecord
from ocnopt.staged import Stage, StagedOCP

STEP, WHEELBASE = 0.03, 2.0


def soft_abs(z: Tensor, width: float) -> Tensor:
    """sqrt(z^2 + width^2) - width: |z| far out, a parabola within ``width``."""
    return torch.sqrt(z**2 + width**2) - width


def dynamics(k: int | Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The state after one step: the front wheels roll ``f``, the rear wheels follow by ``b``."""
    heading, speed, steering, acceleration = x[..., 2], x[..., 3], u[..., 0], u[..., 1]
    f = STEP * speed
    across = f * torch.sin(steering)
    b = WHEELBASE + f * torch.cos(steering) - torch.sqrt(WHEELBASE**2 - across**2)
    return torch.stack(
        [
            x[..., 0] + b * torch.cos(heading),
            x[..., 1] + b * torch.sin(heading),
            heading + torch.asin(across / WHEELBASE),
            speed + STEP * acceleration,
        ],
        dim=-1,
    )


def cost(k: int | Tensor, x: Tensor, u: Tensor) -> Tensor:
    """0.01 (steering^2 + 0.01 acceleration^2) + 0.001 (distance to the lot, softened by 0.1)."""
    effort = 0.01 * (u[..., 0] ** 2 + 0.01 * u[..., 1] ** 2)
    return effort + 0.001 * (soft_abs(x[..., 0], 0.1) + soft_abs(x[..., 1], 0.1))


def terminal_cost(x: Tensor) -> Tensor:
    """In the lot, heading along the x axis, at rest."""
    place = 0.1 * soft_abs(x[..., 0], 0.01) + 0.1 * soft_abs(x[..., 1], 0.01)
    return place + soft_abs(x[..., 2], 0.01) + 0.3 * soft_abs(x[..., 3], 1.0)


def start(steps: int) -> Mapping[str, Tensor]:
    """Steering -0.3, acceleration half a sine wave up and half down."""
    phase = 2 * math.pi * torch.arange(steps, dtype=torch.float64) / steps
    return {"controls": torch.stack([torch.full_like(phase, -0.3), 0.5 * torch.sin(phase)], dim=-1)}


def build(*, initial_state: Any = (1.0, 1.0, 1.5 * math.pi, 0.0), steps: int = 500) -> StagedOCP:
    """The problem from another initial state ``(*batch, 4)`` or with another number of steps."""
    return StagedOCP(
        Stage(dynamics, cost, control_dim=2),
        terminal_cost,
        steps=steps,
        initial_state=initial_state,
        control_bounds=((-0.5, -2.0), (0.5, 2.0)),
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The car from above; the state is the middle of its rear axle."""
    x, y, heading, _ = state.tolist()
    shape(axes, box(2.8, 1.2, (WHEELBASE / 2, 0.0)), (x, y), heading)
    shape(axes, box(0.5, 1.0, (1.5, 0.0)), (x, y), heading, FIXED)
    for along, turn in ((0.0, 0.0), (WHEELBASE, float(control[0]))):
        for across in (-0.62, 0.62):
            c, s = math.cos(heading), math.sin(heading)
            hub = (x + c * along - s * across, y + s * along + c * across)
            shape(axes, box(0.5, 0.2), hub, heading + turn, INK)


def _lot(axes: Axes) -> None:
    shape(axes, box(3.2, 1.8, (WHEELBASE / 2, 0.0)), (0.0, 0.0), 0.0, "none", edgecolor=GOAL, lw=2.0, zorder=1)


RECORD = ControlRecord(
    name="car_parking_tassa",
    summary="park a car with bounded steering and acceleration",
    build=build,
    source="IPOPT at 1e-11 on the exact discrete problem, best of about 45 starts",
    optimal_cost=1.4361004746,
    tolerance=1e-7,
    start="steering -0.3 rad, acceleration 0.5 sin(2 pi k / N) m/s^2, rolled out",
    steps=500,
    discrete_values={500: 1.4361004746},
    other_minima=(1.6450210, 1.9051672, 1.9740308, 2.0272238, 2.8203421),
    state_labels=("x (m)", "y (m)", "heading (rad)", "speed (m/s)"),
    control_labels=("steering (rad)", "acceleration (m/s²)"),
    drawing=Drawing(_frame, _lot, lambda times, states: states[:, :2], x="x (m)", y="y (m)", instants=6),
)
