"""Swing a damped pendulum up from hanging and hold it there: without and with a bound on the torque.

Shapes: x = (theta, omega) ``(..., 2)``, u = torque ``(..., 1)``; theta = 0 is upright, theta = pi hangs. Mass 1 kg,
length 1 m, g = 9.81 m/s^2.

Hanging at rest with u = 0 is a stationary point (cost 208): a solver started there stops at once. With unbounded
torque the registry starts from a guess of the states, theta on a line from pi to 0 within the first quarter, which is
no solution of the dynamics (an infeasible start). With bounded torque it starts from full torque that swings at the
frequency of small oscillations, rolled out, which pumps energy in. From both, DDP and IPOPT find the best known
minimum with 100 and with 500 steps; other starts end in local minima (6.62 without, 9.23 with the bound).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import FIXED, FORCE, GOAL, INK, Axes, Drawing, dot, line
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: theta' = omega, omega' = 9.81 sin(theta) - 0.1 omega + u."""
    theta, omega = x[..., 0], x[..., 1]
    return torch.stack([omega, 9.81 * torch.sin(theta) - 0.1 * omega + u[..., 0]], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """(1 - cos theta) + 0.1 omega^2 + 0.01 u^2."""
    return (1 - torch.cos(x[..., 0])) + 0.1 * x[..., 1] ** 2 + 0.01 * u[..., 0] ** 2


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """100 (1 - cos theta) + 10 omega^2."""
    return 100 * (1 - torch.cos(x[..., 0])) + 10 * x[..., 1] ** 2


def start(steps: int) -> Mapping[str, Tensor]:
    """Guess theta on a line to upright, reached after a quarter of the horizon; everything else zero."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    theta = math.pi * (1 - 4 * share).clamp(min=0)
    states = torch.stack([theta, torch.zeros_like(theta)], dim=-1)
    return {"states": states, "controls": torch.zeros(steps, 1, dtype=torch.float64)}


def start_bounded(steps: int, torque: float, horizon: float) -> Mapping[str, Tensor]:
    """Full torque at the frequency of small oscillations, sqrt(9.81) rad/s."""
    times = horizon / steps * torch.arange(steps, dtype=torch.float64)
    return {"controls": torque * torch.sin(math.sqrt(9.81) * times)[:, None]}


def build(*, initial_state: Any = (math.pi, 0.0), horizon: float = 4.0, torque_limit: float | None = None) -> OCP:
    """The problem from another initial state ``(*batch, 2)``, over another horizon, or with |u| <= torque_limit."""
    return OCP(
        dynamics,
        running_cost,
        terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        control_bounds=None if torque_limit is None else (-torque_limit, torque_limit),
        initial_guess=start if torque_limit is None else partial(start_bounded, torque=torque_limit, horizon=horizon),
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The pole from its pivot, and the torque as an arc around it."""
    theta = float(state[0])
    tip = (-math.sin(theta), math.cos(theta))
    line(axes, [(0.0, 0.0), tip], INK, 3.0)
    dot(axes, tip, size=16.0)
    sweep = 0.2 * float(control[0])
    arc = [0.5 * math.pi + sweep * i / 20 for i in range(21)]
    line(axes, [(0.3 * math.cos(a), 0.3 * math.sin(a)) for a in arc], FORCE, 2.5)
    dot(axes, (0.3 * math.cos(arc[-1]), 0.3 * math.sin(arc[-1])), FORCE, 5.0)


def _backdrop(axes: Axes) -> None:
    dot(axes, (0.0, 0.0), FIXED, 7.0)
    dot(axes, (0.0, 1.0), GOAL, 20.0, fillstyle="none", zorder=1)
    line(axes, [(-1.15, 0.0), (1.15, 0.0)], FIXED, 0.0)


_SOURCE = "orthogonal collocation of degree 4-5 with IPOPT at 1e-11, mesh refined until stable"
_DRAWING = Drawing(_frame, _backdrop)
_STATES = ("angle (rad)", "angular velocity (rad/s)")

RECORD = ControlRecord(
    name="pendulum_swing_up",
    summary="swing a pendulum up and hold it, torque unbounded",
    build=build,
    source=f"{_SOURCE}; 24 random starts give one minimum",
    optimal_cost=2.8278332512,
    tolerance=1e-9,
    start="states: theta linear from pi to 0 within the first quarter, omega 0; controls 0",
    discrete_values={100: 2.8280299143, 500: 2.8278410532},
    state_labels=_STATES,
    control_labels=("torque (N m)",),
    drawing=_DRAWING,
)

RECORD_U5 = ControlRecord(
    name="pendulum_swing_up_u5",
    summary="the same with at most 5 N m: it must swing back first",
    build=partial(build, torque_limit=5.0),
    source=_SOURCE,
    optimal_cost=4.79617026,
    tolerance=1e-8,
    start="controls 5 sin(sqrt(9.81) t), rolled out",
    discrete_values={100: 4.7970766764, 500: 4.7962058561},
    other_minima=(9.225949,),
    state_labels=_STATES,
    control_labels=("torque (N m)",),
    drawing=_DRAWING,
)
