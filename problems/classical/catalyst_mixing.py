"""Mix two catalysts along a reactor so that most of a product comes out: bounds active, then a singular arc.

Shapes: x = (x1, x2), fractions of feed and intermediate, ``(..., 2)``; u = share of the first catalyst ``(..., 1)``; t
is the place along the reactor. The first catalyst turns x1 and x2 into each other, the second x2 into the product
1 - x1 - x2. The optimum is u = 1 up to 0.136299, 0.227142 from there, 0 for the last 0.274770.

Source: Gunn and Thomas, "Mass transport and chemical reaction in multifunctional catalyst systems", Chemical
Engineering Science 20, 1965; Dolan, More and Munson, "Benchmarking optimization software with COPS 3.0", 2004.
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.problems.record import ControlRecord


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Slopes: x1' = u (10 x2 - x1), x2' = u (x1 - 10 x2) - (1 - u) x2."""
    share, back = u[..., 0], u[..., 0] * (10 * x[..., 1] - x[..., 0])
    return torch.stack([back, -back - (1 - share) * x[..., 1]], dim=-1)


def terminal_cost(t: Tensor, x: Tensor) -> Tensor:
    """Minus the product: x1 + x2 - 1."""
    return x[..., 0] + x[..., 1] - 1


def build(*, initial_state: Any = (1.0, 0.0), horizon: float = 1.0) -> OCP:
    """The problem from another feed ``(*batch, 2)`` or for another length of the reactor."""
    return OCP(
        dynamics,
        terminal_cost=terminal_cost,
        initial_state=initial_state,
        control_dim=1,
        horizon=horizon,
        control_bounds=(0.0, 1.0),
        initial_guess=lambda steps: {"controls": torch.full((steps, 1), 0.5, dtype=torch.float64)},
    )


RECORD = ControlRecord(
    name="catalyst_mixing_T1",
    summary="mix two catalysts along a reactor, a singular arc",
    build=build,
    source="bang, singular, bang by matrix exponentials; collocation with 400 steps agrees to 5e-10",
    optimal_cost=-0.048055685861,
    tolerance=1e-10,
    start="controls 0.5, rolled out",
    discrete_values={50: -0.048055318945, 100: -0.0480556158},
    state_labels=("feed x1 (1)", "intermediate x2 (1)"),
    control_labels=("share of the first catalyst (1)",),
)
