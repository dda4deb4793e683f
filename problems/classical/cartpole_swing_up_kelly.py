"""Swing a pole up in two seconds by pushing its cart one metre aside, with least squared force: hard end.

Shapes: x = (position, theta, velocity, omega) ``(..., 4)``, u = force on the cart ``(..., 1)``; theta = 0 hangs, theta
= pi is upright. Cart 1 kg, point mass 0.3 kg on a massless pole of 0.5 m. The bounds |u| <= 20 N and |position| <= 2 m
belong to the problem and are inactive.

There are two minima of nearly the same cost. The source starts from straight lines (:func:`line`), which lead to
58.80767: the cart sets out towards the target, the pole swings back once. The reference solutions hold that minimum.
From zero force, rolled out, and from most random starts solvers find 57.94478: the cart backs off by 0.1 m first, and
the pole swings once more. With 60 constant controls the two cost 59.0323 and 58.2200 (RK4, or collocation on the same
controls: the scheme makes no difference), so that the lower one lies even below the reference's continuous value.
The definition is the same for both.

Source: Kelly, "An introduction to trajectory optimization", SIAM Review 59, 2017, section 6.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.classical import cartpole_swing_up_soft
from ocnopt.problems.record import ControlRecord

POLE, DISTANCE, WALL = 0.3, 1.0, 2.0
dynamics = partial(cartpole_swing_up_soft.dynamics, pole=POLE)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """u^2."""
    return u[..., 0] ** 2


def path_constraint(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The cart stays on its track."""
    return torch.stack([x[..., 0] - WALL, -WALL - x[..., 0]], dim=-1)


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """At rest, one metre aside, the pole upright."""
    return torch.stack([x[..., 0] - DISTANCE, x[..., 1] - math.pi, x[..., 2], x[..., 3]], dim=-1)


def line(steps: int) -> Mapping[str, Tensor]:
    """The source's start: position and angle on straight lines to the end, everything else zero."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    states = torch.stack([DISTANCE * share, math.pi * share, 0 * share, 0 * share], dim=-1)
    return {"states": states, "controls": torch.zeros(steps, 1, dtype=torch.float64)}


def build(*, initial_state: Any = (0.0, 0.0, 0.0, 0.0), horizon: float = 2.0, force_limit: float = 20.0) -> OCP:
    """The problem from another initial state ``(*batch, 4)``, over another horizon, or with another bound."""
    return OCP(
        dynamics,
        running_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        control_bounds=(-force_limit, force_limit),
        path_constraint=path_constraint,
        terminal_constraint=terminal_constraint,
    )


RECORD = ControlRecord(
    name="cartpole_swing_up_kelly",
    summary="swing a pole up within 2 s and 1 m with least force, hard end",
    build=build,
    source="collocation at 5 Legendre points a step with a control at each and IPOPT at 1e-11, 20, 40 and 60 steps; 25 "
    "of 40 random starts with 60 constant controls find it, the others the reference's minimum or one of 305",
    optimal_cost=57.9447803,
    tolerance=1e-7,
    start="controls 0, rolled out",
    discrete_values={60: 58.220016278},
    other_minima=(58.8076674576,),
    state_labels=("position (m)", "angle (rad)", "velocity (m/s)", "angular velocity (rad/s)"),
    control_labels=("force (N)",),
    drawing=cartpole_swing_up_soft.drawing(goal=DISTANCE),
)
