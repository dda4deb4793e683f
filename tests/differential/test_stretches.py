"""Carrying a model over a stretch, whatever walk does it."""

import math
from functools import partial

import pytest
import torch

from ocnopt.differential.columns import terminal_columns
from ocnopt.differential.flow import read_request
from ocnopt.differential.stretches import Packing, blocks_of, carry
from ocnopt.integrate import adaptive, fixed
from ocnopt.integrate.tableaus import BOSH3, DOPRI5, MIDPOINT, RK4
from ocnopt.ocp import OCP
from tests.oracles.compare import relative_error

TIGHT = partial(adaptive.integrate, rtol=1e-10, atol=1e-10, max_evaluations=20_000)


@pytest.mark.parametrize(
    ("tableau", "integrate"),
    [
        (DOPRI5, partial(TIGHT, first_size=0.1)),
        (DOPRI5, TIGHT),
        (BOSH3, TIGHT),
        (DOPRI5, partial(fixed.integrate, step_size=0.01)),
        (RK4, partial(fixed.integrate, step_size=0.01)),
        (MIDPOINT, partial(fixed.integrate, step_size=0.0005)),
    ],
)
def test_every_evaluation_is_gathered_with_the_weight_of_its_own_stage(tableau, integrate):
    """With dx/dt = p x, x(0) = 1 and Phi = x(1)^2 / 2 the gradient in p is exp(2 p), a quadrature along the way."""
    problem = OCP(lambda t, x, u, p: p[..., :1] * x, None, lambda t, x, p: x[..., 0] ** 2 / 2,
                  initial_state=[1.0], parameters=[0.5], horizon=1.0)  # fmt: skip
    flow, _ = read_request(problem, None, None, None, 1e-10, 1e-10)
    end = torch.tensor([math.exp(0.5)], dtype=torch.float64)
    model = terminal_columns(flow, end, None)
    packing = Packing.of((end, *blocks_of(model)), ())
    walk = partial(integrate, tableau=tableau)
    start = carry(model, flow, (end,), (1.0, 0.0), packing=packing, tableau=tableau, integrate=walk)
    assert relative_error(start.X, torch.tensor([math.exp(1.0)], dtype=torch.float64)) <= 1e-6
    assert relative_error(start.p, torch.tensor([math.exp(1.0)], dtype=torch.float64)) <= 1e-6
