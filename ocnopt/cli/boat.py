"""The demo's own problem, defined here as a user would: a boat crosses a river and docks on the other side.

Shapes: x = (along, across, heading, speed) ``(..., 4)``, u = (turn rate, thrust) ``(..., 2)``; lengths in m, time in s.
The river is 20 m wide and fastest in its middle.
"""

import torch
from torch import Tensor

from ocnopt.ocp import OCP

STEPS = 75
STATES = ("along the river (m)", "across the river (m)", "heading (rad)", "speed (m/s)")
CONTROLS = ("turn rate (rad/s)", "thrust (m/s²)")


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The boat moves along its heading and drifts with the current; water slows it down."""
    across, heading, speed = x[..., 1], x[..., 2], x[..., 3]
    current = 1.2 * torch.exp(-(((across - 10) / 5) ** 2))
    along_slope = speed * torch.cos(heading) + current
    across_slope = speed * torch.sin(heading)
    return torch.stack([along_slope, across_slope, u[..., 0], u[..., 1] - 0.2 * speed], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Effort."""
    return 0.5 * u[..., 0] ** 2 + 0.2 * u[..., 1] ** 2


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """Dock right opposite, at (0, 20), at rest."""
    return 10 * x[..., 0] ** 2 + 10 * (x[..., 1] - 20) ** 2 + 10 * x[..., 3] ** 2


def problem() -> OCP:
    """The boat starts at rest, pointing across."""
    return OCP(
        dynamics,
        running_cost,
        terminal_cost,
        initial_state=[0.0, 0.0, 1.5708, 0.0],
        control_dim=2,
        horizon=15.0,
        control_bounds=([-0.5, -1.0], [0.5, 0.5]),
    )
