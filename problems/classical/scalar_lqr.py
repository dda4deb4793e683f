"""The smallest linear-quadratic regulator: x' = u, minimise the integral of x^2 + u^2 over [0, 1].

Shapes: x ``(..., 1)``, u ``(..., 1)``. The Riccati equation has the solution P(t) = tanh(1 - t), so the cost is
tanh(1) x0^2.
"""

from typing import Any

from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slope: x' = u."""
    return u


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """x^2 + u^2."""
    return x[..., 0] ** 2 + u[..., 0] ** 2


def build(*, initial_state: Any = (1.0,), horizon: float = 1.0) -> OCP:
    """The problem from another initial state ``(*batch, 1)`` or over another horizon."""
    return OCP(dynamics, running_cost, initial_state=initial_state, control_dim=1, horizon=horizon)


RECORD = ControlRecord(
    name="scalar_lqr",
    summary="x' = u, minimise the integral of x^2 + u^2",
    build=build,
    source="Riccati equation in closed form, tanh(1) x0^2",
    optimal_cost=0.7615941559557649,
    tolerance=1e-12,
    start="controls 0, rolled out",
    discrete_values={50: 0.761613849001, 100: 0.761599079173},
    state_labels=("state x",),
    control_labels=("control u",),
)
