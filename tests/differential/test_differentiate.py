"""Every derivative of every case against dense derivatives of a fixed fine grid, and what the passes owe besides."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ocnopt.differential.differentiate import differentiate
from ocnopt.differential.flow import read_request
from ocnopt.differential.hvp import hvp
from ocnopt.differential.stretches import trace
from ocnopt.errors import NonFiniteError
from ocnopt.ocp import OCP, FreeHorizon
from tests.differential.cases import CASES, autograd_inside, case, expansion, oracle, pendulum
from tests.oracles.compare import relative_error

# With a running cost, Gauss-Newton is the exact pass with another curvature: a few cases are enough.
EXACT_ALONE = ("only_the_horizon", "staged_controls_only", "parameters_as_one_vector_in_a_batch", "no_dependence")
PAIRS = [(name, "exact") for name in CASES] + [(name, "gauss_newton") for name in CASES if name not in EXACT_ALONE]
EVERY = pytest.mark.parametrize(("name", "curvature"), PAIRS)
STAGED = pytest.mark.parametrize(
    ("name", "curvature"), [pair for pair in PAIRS if CASES[pair[0]]().controls is not None]
)
# The largest error allowed, relative to the largest entry.
MATRICES, COLUMNS = 1e-6, 1e-8


def check(actual, expected, limit):
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= limit


@EVERY
def test_state_and_parameters(name, curvature):
    result, right, problem = expansion(name, curvature), oracle(name, curvature), case(name).problem
    limit = MATRICES if curvature == "exact" or problem.running_cost is not None else COLUMNS
    for block in ("value", "x", "xx"):
        check(getattr(result, block), getattr(right, block), limit)
    q = problem.parameter_dim
    if not q:
        assert result.p is result.pp is result.px is result.Tp is None
        return
    check(result.p, right.p[:q], limit)
    check(result.pp, right.pp[:q, :q], limit)
    check(result.px, right.px[..., :q, :], limit)


@EVERY
def test_end_time(name, curvature):
    result, right, problem = expansion(name, curvature), oracle(name, curvature), case(name).problem
    if not isinstance(problem.horizon, FreeHorizon):
        assert result.T is result.TT is result.Tp is None
        return
    check(result.T, right.p[-1], MATRICES)
    check(result.TT, right.pp[-1, -1], MATRICES)
    if problem.parameter_dim:
        check(result.Tp, right.pp[-1, :-1], MATRICES)


@STAGED
def test_staged_controls(name, curvature):
    result = expansion(name, curvature)
    steps = case(name).controls.shape[-2]
    assert result.u.shape == (*case(name).problem.batch_shape, steps, case(name).problem.control_dim)
    for k in range(steps):
        right = oracle(name, curvature, k)
        check(result.u[..., k, :], right.u, MATRICES)
        check(result.uu[..., k, :, :], right.uu, MATRICES)
        check(result.ux[..., k, :, :], right.ux, MATRICES)


def test_without_staged_controls_there_are_none():
    result = expansion("parameters_only", "exact")
    assert result.u is result.uu is result.ux is result.x_factors is result.p_factors is result.signs is None


@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products(name):
    problem, controls = case(name)
    H = oracle(name, "exact").pp
    for size in {problem.parameter_dim, H.shape[0]} - {0}:
        v = torch.randn(size, dtype=torch.float64)
        check(hvp(problem, None, v, controls=controls, rtol=1e-7, atol=1e-7), H[:size, :size] @ v, MATRICES)


def test_gradient_against_differences_of_scipy():
    problem = CASES["parameters_in_every_cost"]().problem

    def cost(p):
        def slope(t, y):
            x, t = torch.tensor(y[:2]), torch.tensor(t, dtype=torch.float64)
            F, l = pendulum(t, x, None, p), problem.running_cost(t, x, None, p)  # noqa: E741
            return [*F.tolist(), float(l)]

        horizon = problem.horizon
        start = [*problem.initial_state.tolist(), 0.0]
        y = solve_ivp(slope, (horizon.t0, horizon.t1), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        return y[2] + float(problem.terminal_cost(horizon.t1, torch.tensor(y[:2]), p))

    def difference(function, p, i, h):
        e = h * torch.eye(2, dtype=torch.float64)[i]
        return (8 * (function(p + e) - function(p - e)) - (function(p + 2 * e) - function(p - 2 * e))) / (12 * h)

    p = problem.parameters
    gradient = torch.tensor([difference(cost, p, i, 3e-3) for i in range(2)])
    result = differentiate(problem)
    assert relative_error(result.p, gradient) <= 1e-8
    assert relative_error(result.pp, oracle("parameters_in_every_cost", "exact").pp) <= 2e-8


def test_hessian_against_differences_of_the_gradient():
    problem, e = case("parameters_only").problem, 1e-4 * torch.eye(2, dtype=torch.float64)

    def gradient(p):
        return differentiate(problem, parameters=p, curvature="gauss_newton").p

    rows = [(gradient(problem.parameters + d) - gradient(problem.parameters - d)) / 2e-4 for d in e]
    assert relative_error(expansion("parameters_only", "exact").pp, torch.stack(rows)) <= 1e-6


def test_functions_may_use_autograd_inside():
    problem = autograd_inside().problem
    assert not problem.parameters_broadcast
    v, h = torch.ones(4, dtype=torch.float64), 1e-3
    result = differentiate(problem, rtol=1e-6, atol=1e-6)

    def gradient(p):
        return differentiate(problem, parameters=p, curvature="gauss_newton", rtol=1e-6, atol=1e-6).p

    p = problem.parameters
    assert relative_error(result.pp @ v, (gradient(p + h * v) - gradient(p - h * v)) / (2 * h)) <= 1e-4
    assert relative_error(hvp(problem, p, v, rtol=1e-6, atol=1e-6), result.pp @ v) <= 1e-5


def test_the_point_can_be_given():
    problem = CASES["free_horizon"]().problem
    p = torch.tensor([1.5, 0.1], dtype=torch.float64)
    moved = OCP(problem.dynamics, problem.running_cost, problem.terminal_cost, initial_state=problem.initial_state,
                parameters=p, horizon=FreeHorizon(0.7, 0.5, 2.0, t0=0.2))  # fmt: skip
    coarse = {"rtol": 1e-4, "atol": 1e-4}
    given, own = differentiate(problem, parameters=p, horizon=0.7, **coarse), differentiate(moved, **coarse)
    assert torch.equal(given.pp, own.pp)
    assert torch.equal(given.TT, own.TT)
    v, T = torch.ones(3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    assert torch.equal(hvp(problem, p, v, horizon=T, **coarse), hvp(moved, None, v, **coarse))


def test_a_fixed_horizon_can_be_moved():
    problem = OCP(lambda t, x, u: x, None, lambda t, x: t * x[..., 0], initial_state=[1.0], horizon=1.0)
    assert float(differentiate(problem, horizon=2.0).value) == pytest.approx(2 * math.exp(2.0), rel=1e-8)


def test_integrals_that_no_state_shows_are_under_step_control():
    """x stands still at p = 0, and only Q_p or Q_pp would notice the oscillation."""
    problem = OCP(
        lambda t, x, u, p: 0 * x + (p[..., :1] + p[..., 1:] ** 2) * torch.sin(10 * t)[..., None],
        lambda t, x, u, p: p[..., 0] ** 2 * torch.cos(15 * t),
        lambda t, x, p: x[..., 0],
        initial_state=[0.0],
        parameters=[0.0, 0.0],
        horizon=1.0,
    )
    result = differentiate(problem)
    moved = (1 - math.cos(10.0)) / 10
    assert result.p.tolist() == pytest.approx([moved, 0.0], abs=1e-8)
    expected = torch.tensor([[2 * math.sin(15.0) / 15, 0.0], [0.0, 2 * moved]], dtype=torch.float64)
    assert float((result.pp - expected).abs().max()) <= 1e-8


MOVED = 0.5 - math.sin(80.0) / 160


def gathering():
    """x stands still at p = 0 and so do the columns: only their witness sees F_p = sin(40 t)^2."""
    return OCP(
        lambda t, x, u, p: p[..., :1] * torch.sin(40 * t)[..., None] ** 2 + 0 * x,
        None,
        lambda t, x, p: x[..., 0] ** 2 / 2 + x[..., 0],
        initial_state=[0.0],
        parameters=[0.0],
        horizon=1.0,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "exact"},
        {"curvature": "gauss_newton"},
        {"curvature": "gauss_newton", "representation": "low_rank"},
    ],
    ids=["matrix", "columns", "low rank"],
)
def test_what_is_gathered_is_under_step_control(options):
    result = differentiate(gathering(), **options)
    pp = result.p_factors[0, 0] ** 2 if "representation" in options else result.pp
    assert float(result.p) == pytest.approx(MOVED, abs=1e-8)
    assert float(pp) == pytest.approx(MOVED**2, abs=1e-8)


def test_what_a_product_gathers_is_under_step_control():
    assert float(hvp(gathering(), None, torch.ones(1))) == pytest.approx(MOVED**2, abs=1e-8)


def test_a_stiff_path_is_kept_by_many_stretches_and_a_smooth_one_by_few():
    """x' = -p0 (x - p1) forgets its start: backwards an error grows by e^100."""
    stiff = OCP(lambda t, x, u, p: -p[..., :1] * (x - p[..., 1:]), None, lambda t, x, p: x[..., 0] ** 2,
                initial_state=[0.0], parameters=[100.0, 2.0], horizon=1.0)  # fmt: skip
    flow, controls = read_request(stiff, None, None, None, 1e-6, 1e-6)
    assert len(trace(flow, controls)[0].stretches) > 20
    result = differentiate(stiff, curvature="gauss_newton", rtol=1e-6, atol=1e-6)
    assert result.p.tolist() == pytest.approx([0.0, 4.0], abs=1e-6)
    assert float(result.pp[1, 1]) == pytest.approx(2.0, rel=1e-6)
    smooth = CASES["parameters_only"]().problem
    counts = [len(trace(*read_request(smooth, None, None, None, tol, tol))[0].stretches) for tol in (1e-4, 1e-11)]
    assert max(counts) <= 6


def test_tolerances_stop_at_the_rounding_of_the_dtype():
    def make(dtype):
        return OCP(lambda t, x, u, p: -p * x, lambda t, x, u, p: x[..., 0] ** 2, lambda t, x, p: x[..., 0] ** 4,
                   initial_state=[1.0], parameters=[0.7], horizon=1.0, dtype=dtype)  # fmt: skip

    low, high = differentiate(make(torch.float32)), differentiate(make(torch.float64))
    assert low.pp.dtype == torch.float32
    assert relative_error(low.pp, high.pp) <= 1e-4
    assert relative_error(hvp(make(torch.float32), None, torch.ones(1)), high.pp[0]) <= 1e-4


@settings(max_examples=3)
@given(batch=st.sampled_from([(1,), (3,), (2, 1), (2, 2)]), seed=st.integers(0, 100))
def test_means_over_a_batch_are_means_of_single_samples(batch, seed):
    x0 = torch.randn(*batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def make(x):
        return OCP(pendulum, lambda t, x, u, p: p[..., 0] * x[..., 0] ** 2, lambda t, x, p: (x**2).sum(-1),
                   initial_state=x, parameters=[1.0, 0.2], horizon=0.5)  # fmt: skip

    together = differentiate(make(x0), rtol=1e-4, atol=1e-4)
    alone = [differentiate(make(x), rtol=1e-4, atol=1e-4) for x in x0.reshape(-1, 2)]
    for block in ("value", "p", "pp"):
        check(getattr(together, block), torch.stack([getattr(one, block) for one in alone]).mean(0), 1e-3)
    for block in ("x", "xx", "px"):
        stacked = torch.stack([getattr(one, block) for one in alone])
        check(getattr(together, block), stacked.reshape(*batch, *stacked.shape[1:]), 1e-3)


def test_a_result_is_frozen_and_carries_no_graph():
    result = expansion("network", "exact")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.p = None
    tensors = [v for v in vars(result).values() if v is not None]
    assert not any(v.requires_grad for v in tensors)


def test_a_path_that_leaves_the_finite_numbers_is_an_error():
    problem = OCP(
        lambda t, x, u: torch.sqrt(1.0 - t)[..., None] * x,
        None,
        lambda t, x: x[..., 0],
        initial_state=[1.0],
        horizon=1.0,
    )
    with pytest.raises(NonFiniteError, match="NaN or infinity near t = 1"):
        differentiate(problem, horizon=3.0, rtol=1e-3, atol=1e-3)
