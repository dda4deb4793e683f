"""What p reaches decides whether a function accepts it with leading axes."""

import pytest
import torch

from ocnopt.differential.differentiate import differentiate
from ocnopt.leading_axes import accepts_leading_axes
from ocnopt.modules import from_module
from ocnopt.ocp import OCP
from tests.differential.cases import Field

BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


def accepts(function, batch, q=2):
    x, p = torch.rand(*batch, 2, dtype=torch.float64), torch.ones(q, dtype=torch.float64)
    return accepts_leading_axes(function, {"t": torch.tensor(0.5).double(), "x": x}, p)


@BATCHES
@pytest.mark.parametrize(
    "function",
    [
        lambda t, x, p: p[..., :1] * x + p[..., 1:] * t[..., None],
        lambda t, x, p: p * x,
        lambda t, x, p: torch.cat([x[..., :1], p[..., 1:].expand_as(x[..., 1:])], dim=-1),
        lambda t, x, p: torch.cat([x[..., :1], p[..., 1:].expand(*x.shape[:-1], 1)], dim=-1),
        lambda t, x, p: p.sum(-1) * x[..., 0],
        lambda t, x, p: p[..., 0] ** 2 * t,
        lambda t, x, p: t,
        lambda t, x, p: (p.reshape(*p.shape[:-1], 1, 2) * x[..., None, :]).sum(-1).expand_as(x),
        lambda t, x, p: torch.sqrt(p[..., :1] - p[..., 1:]) * x,
    ],
)
def test_the_last_axis_is_accepted(function, batch):
    assert accepts(function, batch)


def test_where_every_axis_is_needed_each_sample_has_its_own():
    def row_by_row(t, x, p):
        return x * p if p.ndim == 1 else (x.reshape(-1, 2) * p.reshape(-1, 2)).reshape(x.shape)

    assert accepts(row_by_row, (3,))


@BATCHES
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-300])
@pytest.mark.parametrize(
    "function",
    [
        lambda p: p[0],
        lambda p: p[-1],
        lambda p: p.sum(),
        lambda p: p[:1].sum(-1),
        lambda p: p.reshape(-1)[0],
    ],
)
def test_an_index_from_the_front_is_found_however_small_its_effect(function, size, batch):
    assert not accepts(lambda t, x, p: x + size * function(p), batch, q=1)


def test_a_small_effect_through_the_first_axis_is_not_lost():
    """x(1) = 1e-9 p and the cost (1e9 x)^2 = p^2: the second derivative is 2 for every batch."""
    problem = OCP(
        lambda t, x, u, p: 1e-9 * p[0] * torch.ones_like(x),
        None,
        lambda t, x, p: (1e9 * x[..., 0]) ** 2,
        initial_state=torch.zeros(3, 1, dtype=torch.float64),
        parameters=[1.0],
        horizon=1.0,
    )
    assert not problem.parameters_broadcast
    for curvature in ("exact", "gauss_newton"):
        result = differentiate(problem, curvature=curvature)
        assert float(result.p) == pytest.approx(2.0, rel=1e-9)
        assert float(result.pp) == pytest.approx(2.0, rel=1e-9)


def test_a_network_is_asked_about_one_sample():
    """Its rows are alike by contract: no copy of the weights for each of the samples."""
    seen = []

    class Watched(Field):
        def forward(self, t, x):
            seen.append(x.shape[0])
            return super().forward(t, x)

    problem = from_module(Watched(2, 3), lambda t, x: x[..., 0], initial_state=torch.ones(50, 2), horizon=1.0)
    assert problem.parameters_broadcast
    each = seen.count(1)
    assert 0 < each <= 2
