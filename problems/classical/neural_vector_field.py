"""Bring a learned oscillator to rest: the dynamics are a small network with fixed weights, pushed by a bounded force.

Shapes: x = (position, velocity) ``(..., 2)``, u = force ``(..., 1)``, |u| <= 1. The network has eight tanh units; it
was fitted to the slopes of van der Pol's oscillator, q'' = (1 - q^2) q' - q, at 2000 random points of |q| < 2.5,
|q'| < 3.5 (mean squared error 0.02), and its weights were rounded to two decimals. As its model does, it circles for
ever when left alone, and rest is unstable.

Source: weights and costs computed here.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import GOAL, Axes, Drawing, arrow, dot
from ocnopt.problems.record import ControlRecord

# one row a unit: the weights of position and velocity, and the bias
INNER = (
    (-1.29, -0.47, -3.96),
    (-1.32, -0.47, 3.99),
    (-0.94, -0.37, 0.0),
    (0.0, 0.19, 0.01),
    (-1.3, 0.46, 4.11),
    (0.04, 0.4, 0.0),
    (1.27, -0.45, 4.06),
    (-0.8, 0.3, 0.0),
)
# one row a slope: the weights of the units, and the bias
OUTER = (
    (-0.29, -0.3, -0.25, 4.67, 0.32, 0.18, -0.34, 0.32, 0.01),
    (7.95, 7.6, -3.54, -0.65, -7.5, -3.87, 7.91, 5.24, -0.04),
)


def network(x: Tensor) -> Tensor:
    """The slopes that the network predicts, ``(..., 2)``."""
    inner, outer = x.new_tensor(INNER), x.new_tensor(OUTER)
    units = torch.tanh((inner[:, :2] * x[..., None, :]).sum(-1) + inner[:, 2])
    return (outer[:, :-1] * units[..., None, :]).sum(-1) + outer[:, -1]


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The network's slopes, and the force on the velocity."""
    return network(x) + torch.cat([torch.zeros_like(u), u], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """position^2 + velocity^2 + u^2."""
    return (x**2).sum(-1) + u[..., 0] ** 2


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """10 (position^2 + velocity^2)."""
    return 10 * (x**2).sum(-1)


def build(*, initial_state: Any = (0.0, 2.0), horizon: float = 8.0, force_limit: float = 1.0) -> OCP:
    """The problem from another initial state ``(*batch, 2)``, over another horizon, or with another bound."""
    return OCP(
        dynamics,
        running_cost,
        terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        control_bounds=(-force_limit, force_limit),
    )


def _frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
    """The state and the force, which changes the velocity."""
    dot(axes, state.tolist())
    arrow(axes, state.tolist(), (0.0, 0.8 * float(control[0])), 0.12)


def _field(axes: Axes) -> None:
    """The network's slopes, arrows of one length."""
    x = torch.cartesian_prod(torch.linspace(-1.0, 2.6, 19), torch.linspace(-1.6, 2.4, 17)).double()
    slopes = network(x)
    slopes = slopes / torch.linalg.vector_norm(slopes, dim=-1, keepdim=True)
    axes.quiver(*x.T.numpy(), *slopes.T.numpy(), color="#c3cad2", angles="xy", scale=26, width=0.0028, zorder=0)
    dot(axes, (0.0, 0.0), GOAL, 16.0, fillstyle="none", zorder=1)


RECORD = ControlRecord(
    name="neural_vector_field",
    summary="bring an oscillator to rest whose dynamics a network learned",
    build=build,
    source="collocation at 4 Legendre points a step with a control at each, 50 to 400 steps; DDP and IPOPT with "
    "constant controls tend to it; 12 random starts give one minimum",
    optimal_cost=11.1560148,
    tolerance=1e-7,
    start="controls 0, rolled out",
    discrete_values={50: 11.164704878, 100: 11.1584295075},
    state_labels=("position (1)", "velocity (1)"),
    control_labels=("force (1)",),
    drawing=Drawing(_frame, _field, lambda times, states: states, x="position", y="velocity", equal=True),
)
