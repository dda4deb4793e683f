"""Goddard's rocket: burn 40 % of its mass so that it rises as high as possible, against drag and fading gravity.

Shapes: x = (h, v, m) ``(..., 3)``, u = thrust ``(..., 1)``, T free. Everything is scaled: altitude by the Earth's
radius (h counts from its centre, so the start is h = 1), mass by the mass at the start, gravity there is 1. Full
thrust, then a singular arc on which weight and drag balance (m g = D (1 + v / c)), then coasting: the thrust of a
direct method chatters a little on the arc. The cost is minus the altitude.

Source: Bryson and Ho, Applied Optimal Control, 1975; the constants of Dolan, More and Munson, "Benchmarking
optimization software with COPS 3.0", 2004.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.problems.drawing import BODY, FIXED, FORCE, Axes, Drawing, box, shape
from ocnopt.problems.record import ControlRecord

DRAG, DECAY, EXHAUST, DRY = 310.0, 500.0, 0.5, 0.6


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: h' = v, v' = (thrust - drag) / m - 1 / h^2, m' = -thrust / c; drag 310 v^2 exp(-500 (h - 1))."""
    h, v, m, thrust = x[..., 0], x[..., 1], x[..., 2], u[..., 0]
    drag = DRAG * v**2 * torch.exp(-DECAY * (h - 1))
    return torch.stack([v, (thrust - drag) / m - 1 / h**2, -thrust / EXHAUST], dim=-1)


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """Minus the altitude."""
    return -x[..., 0]


def terminal_constraint(t: Tensor, x: Tensor) -> Tensor:
    """The fuel is burnt: m(T) = 0.6."""
    return x[..., 2:] - DRY


def start(steps: int) -> Mapping[str, Any]:
    """Fuel burnt evenly; altitude on a line, speed up and down again."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    states = torch.stack([1 + 0.01 * share, 0.4 * share * (1 - share), 1 - (1 - DRY) * share], dim=-1)
    return {"states": states, "controls": torch.ones(steps, 1, dtype=torch.float64)}


def build(*, initial_state: Any = (1.0, 0.0, 1.0), thrust_limit: float = 3.5) -> OCP:
    """The problem from another initial state ``(*batch, 3)`` or with another bound on the thrust."""
    return OCP(
        dynamics,
        terminal_cost=terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=FreeHorizon(initial=0.2, lower=0.05, upper=1.0),
        control_bounds=(0.0, thrust_limit),
        terminal_constraint=terminal_constraint,
        initial_guess=start,
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The rocket beside its altitude: what is left of its fuel is blue, its flame as long as its thrust."""
    altitude, fuel = 1000 * (float(state[0]) - 1), (float(state[2]) - DRY) / (1 - DRY)
    wide, tall = 0.007, 1.3
    place = (time, altitude)
    flame = 0.35 * float(control[0])
    shape(axes, [(-0.3 * wide, 0.0), (0.3 * wide, 0.0), (0.0, -flame)], place, colour=FORCE)
    shape(axes, [(-wide, 0.0), (wide, 0.0), (0.0, 0.6)], place, colour=FIXED)
    shape(axes, box(wide, tall, (0.0, tall / 2)), place, colour="white", edgecolor=FIXED)
    shape(axes, box(wide, tall * fuel, (0.0, tall * fuel / 2)), place, colour=BODY)
    shape(axes, [(-wide / 2, tall), (wide / 2, tall), (0.0, 1.35 * tall)], place, colour=FIXED)


def _altitude(times: Tensor, states: Tensor) -> Tensor:
    return torch.stack([times, 1000 * (states[:, 0] - 1)], dim=-1)


RECORD = ControlRecord(
    name="goddard_rocket",
    summary="burn a rocket's fuel so that it rises highest, a singular arc",
    build=build,
    source="bang, singular, coast integrated at 1e-13 on the closed-form singular surface; collocation agrees",
    optimal_cost=-1.012836918317,
    tolerance=1e-9,
    start="states: mass and altitude on lines, speed a parabola of 0.1; thrust 1; T = 0.2",
    T_star=0.19885626,
    discrete_values={50: -1.01283654906, 100: -1.01283686058},
    state_labels=("altitude (1)", "speed (1)", "mass (1)"),
    control_labels=("thrust (1)",),
    drawing=Drawing(_frame, None, _altitude, x="time (1)", y="altitude (Earth's radius / 1000)", equal=False),
)
