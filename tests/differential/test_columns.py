"""Columns against matrices: the same Gauss-Newton curvature by two routes."""

import pytest
import torch

from ocnopt.differential.columns import columns_suffice
from ocnopt.differential.differentiate import _by_matrix, differentiate
from ocnopt.differential.flow import read_request
from ocnopt.differential.stretches import trace
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from tests.differential.cases import CASES, case, oracle, pendulum
from tests.differential.dense import Oracle
from tests.oracles.compare import relative_error

PLAIN = [
    "parameters_only",
    "batch_with_targets",
    "terminal_cost_reads_parameters",
    "free_horizon_without_running_cost",
    "staged_controls_shared_no_running_cost",
    "one_vector_and_a_plain_terminal_cost",
    "no_dependence",
]

# The matrices' own steps are held to 1e-7.
SAME = 1e-6


def low_rank(problem, **options):
    return differentiate(problem, curvature="gauss_newton", representation="low_rank", **options)


@pytest.mark.parametrize("name", PLAIN)
def test_factors_give_the_matrices(name):
    problem, controls = case(name)
    flow, u = read_request(problem, None, controls, None, 1e-7, 1e-7)
    matrices, readouts = _by_matrix(flow, trace(flow, u)[0], exact=False)
    result, q = low_rank(problem, controls=controls), problem.parameter_dim
    X, p, s = result.x_factors, result.p_factors, result.signs[..., None]
    assert relative_error(X.mT @ (s * X), matrices.XX) <= SAME
    assert relative_error(p.mT @ (s * X), matrices.pX[..., :q, :]) <= SAME
    total = (p.mT @ (s * p)).reshape(-1, q, q).mean(0)
    assert relative_error(total, matrices.pp[:q, :q] / flow.samples) <= SAME
    assert relative_error(result.x, matrices.X) <= SAME
    assert relative_error(result.p, matrices.p[:q] / flow.samples) <= SAME
    assert result.xx is result.px is result.pp is None
    if result.u is not None:
        assert relative_error(result.uu, torch.stack([r.uu for r in readouts if r is not None], -3)) <= SAME
    if result.T is not None:
        assert relative_error(result.TT, matrices.pp[-1, -1] / flow.samples) <= SAME
        assert relative_error(result.Tp, matrices.pp[-1, :-1] / flow.samples) <= SAME


@pytest.mark.parametrize("name", PLAIN[:3])
def test_factors_give_the_dense_gauss_newton_matrix(name):
    result = low_rank(case(name).problem)
    p, s = result.p_factors, result.signs[..., None]
    total = (p.mT @ (s * p)).reshape(-1, 2, 2).mean(0)
    assert relative_error(total, oracle(name, "gauss_newton").pp) <= 1e-8


def indefinite(batch=()):
    H = torch.tensor([[0.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    x0 = torch.randn(*batch, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return OCP(pendulum, None, lambda t, x, p: 0.5 * torch.einsum("...i,ij,...j", x, H, x), initial_state=x0,
               parameters=[1.0, 0.2], horizon=0.7)  # fmt: skip


def test_an_indefinite_terminal_hessian_has_signs():
    result = low_rank(indefinite((3,)))
    assert result.x_factors.shape == (3, 2, 2)
    assert result.p_factors.shape == (3, 2, 2)
    assert result.signs.tolist() == [[1.0, -1.0]] * 3


def test_rank_keeps_the_largest_eigenvalues():
    every, one = low_rank(indefinite()), low_rank(indefinite(), rank=1)
    assert one.p_factors.shape == (1, 2)
    assert relative_error(one.p_factors, every.p_factors[:1]) <= 1e-8
    assert low_rank(indefinite(), rank=7).p_factors.shape == (2, 2)


def test_null_columns_are_dropped_and_rank_one_curvature_is_the_gradient_squared():
    """Phi = (c . x)^2 / 2 has one factor, and with c . x(T) = s the gradient is s J^T c, the curvature J^T c c^T J."""
    c = torch.tensor([0.3, -1.0], dtype=torch.float64)
    problem = OCP(pendulum, None, lambda t, x, p: (x @ c) ** 2 / 2, initial_state=[1.0, 0.5], parameters=[1.0, 0.2],
                  horizon=1.0)  # fmt: skip
    result, dense = low_rank(problem), differentiate(problem, curvature="gauss_newton")
    assert result.p_factors.shape == (1, 2)
    squared = result.p[:, None] * result.p / (2 * result.value)
    assert relative_error(dense.pp, squared) <= 1e-8


def test_matrices_carry_what_columns_would_not():
    """A terminal cost that reads every parameter, or p as one vector in a batch, is no case for columns."""

    def suffice(problem):
        flow, u = read_request(problem, None, None, None, 1e-6, 1e-6)
        return columns_suffice(flow, trace(flow, u)[0].end[0])

    decay = OCP(lambda t, x, u, p: x * p[..., :1], None, lambda t, x, p: (p**2).sum(-1) + x[..., 0] ** 2,
                initial_state=[1.0], parameters=[0.1, 0.2, 0.3], horizon=1.0)  # fmt: skip
    assert not suffice(decay)
    result = differentiate(decay, curvature="gauss_newton")
    assert relative_error(result.pp, Oracle(decay).dense(exact=False).pp) <= 1e-8
    assert not suffice(CASES["parameters_in_every_cost"]().problem)
    assert suffice(CASES["one_vector_and_a_plain_terminal_cost"]().problem)
    assert suffice(CASES["terminal_cost_reads_parameters"]().problem)


def test_one_vector_in_the_terminal_cost_of_a_batch_is_refused():
    problem = OCP(lambda t, x, u, p: torch.tanh(x @ p.reshape(2, 2)), None, lambda t, x, p: (x**2).sum(-1) * p[0],
                  initial_state=torch.ones(3, 2), parameters=torch.ones(4), horizon=1.0)  # fmt: skip
    with pytest.raises(
        ProblemError, match=r"terminal_cost reads the parameters or T.*index the last axis, p\[\.\.\., i\]"
    ):
        low_rank(problem)
    right = Oracle(problem).dense(exact=False)
    assert relative_error(differentiate(problem, curvature="gauss_newton").pp, right.pp) <= 1e-8


def test_only_the_horizon_has_x_factors_alone():
    problem = OCP(lambda t, x, u: -x, None, lambda t, x: x[..., 0] ** 2 + t**2, initial_state=[2.0],
                  horizon=FreeHorizon(1.0, 0.5, 2.0))  # fmt: skip
    result = low_rank(problem)
    assert result.p_factors is result.p is result.Tp is None
    assert result.x_factors.shape == (2, 1)
    assert relative_error(result.TT, Oracle(problem).dense(exact=False).pp[0, 0]) <= 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "exact"}, "low_rank' comes with curvature='exact'; expected curvature='gauss_newton'"),
        ({"rank": 0}, "rank is 0; expected an integer >= 1"),
        (
            {"representation": "lowrank"},
            "representation is 'lowrank'; expected 'dense' or 'low_rank'; did you mean 'low_rank'",
        ),
        ({"representation": "dense", "rank": 2}, "rank=2 is given for dense matrices"),
        ({"curvature": "gaussnewton"}, "curvature is 'gaussnewton'; expected .* did you mean 'gauss_newton'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ProblemError, match=message):
        differentiate(indefinite(), **{"representation": "low_rank", **options})


def test_a_running_cost_is_refused_with_what_to_use_instead():
    problem = CASES["parameters_in_every_cost"]().problem
    with pytest.raises(ProblemError, match="has a running cost; .*use representation='dense' or oc.hvp"):
        differentiate(problem, representation="low_rank")
