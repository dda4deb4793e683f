"""A linear-quadratic regulator whose cost couples state and control: Hager's test of discretisations.

Shapes: x ``(..., 1)``, u ``(..., 1)``. The optimal state is cosh(1 - t) / cosh(1), the cost tanh(1) x0^2. A scheme
that treats the cross term with less order than the rest shows it here. The definition without the factor 1/2 is used.

Source: Hager, "Runge-Kutta methods in optimal control and the transformed adjoint system", Numerische Mathematik 87,
2000, section 7.
"""

from typing import Any

from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slope: x' = x/2 + u."""
    return x / 2 + u


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """u^2 + x u + 1.25 x^2."""
    return u[..., 0] ** 2 + x[..., 0] * u[..., 0] + 1.25 * x[..., 0] ** 2


def build(*, initial_state: Any = (1.0,), horizon: float = 1.0) -> OCP:
    """The problem from another initial state ``(*batch, 1)`` or over another horizon."""
    return OCP(dynamics, running_cost, initial_state=initial_state, control_dim=1, horizon=horizon)


RECORD = ControlRecord(
    name="hager_lq",
    summary="a linear regulator whose cost has a term x u",
    build=build,
    source="closed form tanh(1) x0^2; collocation agrees",
    optimal_cost=0.7615941559557649,
    tolerance=1e-12,
    start="controls 0, rolled out",
    discrete_values={50: 0.761624939814, 100: 0.761601851819},
    state_labels=("state x",),
    control_labels=("control u",),
)
