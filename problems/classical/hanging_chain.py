"""Calm a chain that is let go: eight masses on springs between a fixed point and an end that a hand moves.

Shapes: x = (positions of the masses, position of the end, velocities of the masses) ``(..., 34)``, each (x, y), y up;
u = velocity of the end ``(..., 2)``, at most 1 m/s along each axis. The masses start at rest, evenly on the
level line from the fixed point (0, 0) to the end at (7.5, 0): the chain falls, and its end must come to rest where it
began once the swing is taken out. The velocity of the end jumps often between its bounds, so that costs tend slowly to
the continuous one.

Source: the chain of Wirsching, Bock and Diehl, "Fast NMPC of a chain of masses connected by springs", 2006, with its
stage cost, in the plane and with the constants below; costs computed here.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import FIXED, FORCE, GOAL, INK, Axes, Drawing, arrow, dot, line
from ocnopt.problems.record import ControlRecord

MASSES, MASS, STIFFNESS, REST_LENGTH, GRAVITY = 8, 0.03, 1.0, 0.033, 9.81
SPEED_LIMIT, TARGET = 1.0, (7.5, 0.0)


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the masses ``(..., 8, 2)``, of the end ``(..., 2)``, and velocities ``(..., 8, 2)``."""
    positions, end, velocities = x.split([2 * MASSES, 2, 2 * MASSES], dim=-1)
    return positions.unflatten(-1, (MASSES, 2)), end, velocities.unflatten(-1, (MASSES, 2))


def links(x: Tensor) -> Tensor:
    """All points from the fixed one to the end, ``(..., 10, 2)``."""
    positions, end, _ = split(x)
    return torch.cat([torch.zeros_like(end[..., None, :]), positions, end[..., None, :]], dim=-2)


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Springs pull along their links by how much they are longer than at rest; the hand moves the end."""
    points = links(x)
    spans = points[..., 1:, :] - points[..., :-1, :]
    lengths = torch.sqrt((spans**2).sum(-1, keepdim=True))
    pulls = STIFFNESS * (1 - REST_LENGTH / lengths) * spans
    accelerations = (pulls[..., 1:, :] - pulls[..., :-1, :]) / MASS - x.new_tensor([0.0, GRAVITY])
    return torch.cat([x[..., 2 * MASSES + 2 :], u, accelerations.flatten(-2)], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """25 |end - target|^2 + sum of |velocity|^2 + 0.01 |u|^2."""
    _, end, velocities = split(x)
    miss = ((end - x.new_tensor(TARGET)) ** 2).sum(-1)
    return 25 * miss + (velocities**2).sum((-2, -1)) + 0.01 * (u**2).sum(-1)


def build(*, initial_state: Any = None, horizon: float = 8.0) -> OCP:
    """The problem from another initial state ``(*batch, 34)`` or over another horizon."""
    if initial_state is None:
        across = TARGET[0] / (MASSES + 1) * torch.arange(1, MASSES + 2, dtype=torch.float64)
        level = torch.stack([across, 0 * across], dim=-1).flatten()
        initial_state = torch.cat([level, torch.zeros(2 * MASSES, dtype=torch.float64)])
    return OCP(
        dynamics,
        running_cost,
        initial_state=initial_state,
        control_dim=2,
        horizon=horizon,
        control_bounds=(-SPEED_LIMIT, SPEED_LIMIT),
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The links, the masses, and the velocity of the end."""
    points = links(state).tolist()
    line(axes, points, INK, 1.5)
    for point in points[1:-1]:
        dot(axes, point, size=6.0)
    dot(axes, points[-1], FORCE, 7.0)
    arrow(axes, points[-1], control.tolist(), 0.25, width=1.5)


def _ends(axes: Axes) -> None:
    dot(axes, (0.0, 0.0), FIXED, 9.0, marker="s")
    dot(axes, TARGET, GOAL, 16.0, fillstyle="none", zorder=1)


RECORD = ControlRecord(
    name="hanging_chain",
    summary="calm a chain of eight masses by moving its end",
    build=build,
    source="IPOPT with 160 and 320 constant controls: 303.2007, 303.1943; collocation at 4 Legendre points a step with "
    "a control at each, 40, 80 and 120 steps: 303.1978, 303.1861, 303.1888; DDP agrees with IPOPT on 40 steps",
    optimal_cost=303.19,
    tolerance=1e-2,
    start="controls 0, rolled out",
    steps=80,
    discrete_values={40: 294.512023656, 80: 302.7927844954},
    state_labels=(
        *(f"{axis}{place} (m)" for place in (*range(1, MASSES + 1), " end") for axis in "xy"),
        *(f"v{axis}{place} (m/s)" for place in range(1, MASSES + 1) for axis in "xy"),
    ),
    control_labels=("x velocity of the end (m/s)", "y velocity of the end (m/s)"),
    drawing=Drawing(_frame, _ends, lambda times, states: states[:, 2 * MASSES : 2 * MASSES + 2], x="x (m)", y="y (m)"),
)
