"""One step: the order conditions of Butcher's trees, scipy's coefficients, and what a step evaluates."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.integrate.runge_kutta import closed, combine, interpolate, stages, step, weighted_sum
from ocnopt.integrate.tableaus import TABLEAUS
from tests.oracles.compare import assert_close

METHODS = sorted(TABLEAUS)
PAIRS = sorted(name for name, tableau in TABLEAUS.items() if tableau.b_error is not None)


@cache
def trees(n):
    """The rooted trees with n nodes, as nested tuples: children of the root, none before one that is smaller."""
    found = {1: [()]}.get(n, [])
    for sizes in partitions(n - 1):
        for children in product(*(list(enumerate(trees(size))) for size in sizes)):
            pairs = list(zip(sizes, (i for i, _ in children), strict=True))
            if n > 1 and pairs == sorted(pairs, reverse=True):
                found.append(tuple(child for _, child in children))
    return found


def partitions(n, largest=None):
    """Ways to write n as a sum, largest term first."""
    if n == 0:
        yield ()
    for first in range(min(n, largest or n), 0, -1):
        for rest in partitions(n - first, first):
            yield (first, *rest)


def matrix(tableau):
    s = len(tableau.b)
    return np.array([list(row) + [0.0] * (s - len(row)) for row in tableau.a])


def nodes(tree):
    return 1 + sum(nodes(child) for child in tree)


def density(tree):
    return nodes(tree) * np.prod([density(child) for child in tree])


def weights(tree, A):
    """The elementary weight of every stage."""
    value = np.ones(len(A))
    for child in tree:
        value = value * (A @ weights(child, A))
    return value


def misses(b, A, order):
    """By how much weights b miss the order conditions of all trees with as many nodes."""
    return [abs(b @ weights(tree, A) - 1 / density(tree)) for tree in trees(order)]


def test_all_trees_are_there():
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@pytest.mark.parametrize("name", METHODS)
def test_order_conditions(name):
    tableau = TABLEAUS[name]
    A, b = matrix(tableau), np.array(tableau.b)
    for order in range(1, tableau.order + 1):
        # coefficients of tsit5 and dopri8 are as large as 17
        assert max(misses(b, A, order)) < 5e-15
    assert max(misses(b, A, tableau.order + 1)) > 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_the_embedded_method_has_one_order_less(name):
    tableau = TABLEAUS[name]
    A, b_hat = matrix(tableau), np.array(tableau.b) - np.array(tableau.b_error)
    for order in range(1, tableau.order):
        assert max(misses(b_hat, A, order)) < 5e-15
    assert max(misses(b_hat, A, tableau.order)) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_order_conditions_within_a_step(name):
    tableau = closed(TABLEAUS[name])
    A, order = matrix(tableau), {"dopri8": 5, "dopri5": 4, "tsit5": 4}.get(name, min(tableau.order, 3))
    theta = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    # the slopes are unit vectors, so that the states are the weights
    at = interpolate(tableau, 1.0, torch.zeros(len(A)).double(), [*torch.eye(len(A)).double()], theta)
    for t, b in zip(theta.tolist(), at.numpy(), strict=True):
        for n in range(1, order + 1):
            assert max(abs(b @ weights(tree, A) - t**n / density(tree)) for tree in trees(n)) < 1e-13
    assert_close(at[-1], tableau.b, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_an_interpolant_has_the_slopes_of_the_ends(name):
    tableau = closed(TABLEAUS[name])
    eye, zero = torch.eye(len(tableau.b)).double(), torch.zeros(len(tableau.b)).double()

    def state(theta):
        return interpolate(tableau, 1.0, zero, [*eye], theta)[0]

    start, end = (torch.autograd.functional.jacobian(state, torch.tensor([t]).double())[:, 0] for t in (0.0, 1.0))
    assert_close(start, eye[0], atol=1e-13)
    assert_close(end, eye[-1], atol=1e-12)


def test_a_closed_method_takes_the_same_steps_and_knows_the_slope_at_the_end():
    x = torch.rand(3, dtype=torch.float64)
    for name in METHODS:
        (end, _), (same, seen) = (
            step(tableau, lambda t, x: torch.sin(x) * t, 0.5, 0.1, x)
            for tableau in (TABLEAUS[name], closed(TABLEAUS[name]))
        )
        assert torch.equal(end, same)
        assert_close(seen.slopes[-1], torch.sin(end) * 0.6, rtol=1e-14)


def test_stages_of_equal_weight_are_grouped_without_a_change_of_the_step():
    for name in sorted(set(METHODS) - {n for n in METHODS if TABLEAUS[n].is_solved_in_turn}):
        tableau, x = TABLEAUS[name], torch.rand(3, dtype=torch.float64)
        for row, groups in zip((*tableau.a, tableau.b), tableau.groups, strict=True):
            came = sorted((j, weight) for weight, first, others in groups for j in (first, *others))
            assert came == [(j, weight) for j, weight in enumerate(row) if weight]
        end, seen = step(tableau, lambda t, x: torch.sin(x) * t, 0.5, 0.1, x)
        assert_close(end, combine(x, 0.1, tableau.b, seen.slopes), rtol=1e-14, atol=0.0)


def test_coefficients_are_those_of_scipy():
    for name, method in (("dopri5", scipy.integrate.RK45), ("bosh3", scipy.integrate.RK23)):
        tableau, (rows, columns) = TABLEAUS[name], method.A.shape
        assert_close(matrix(tableau)[:rows, :columns], method.A, rtol=1e-15)
        assert_close(tableau.b[: method.n_stages], method.B, rtol=1e-15)
        assert_close(np.abs(tableau.b_error), np.abs(method.E), rtol=1e-13)


def test_coefficients_are_those_of_torchdiffeq():
    pytest.importorskip("torchdiffeq")
    from torchdiffeq._impl.adaptive_heun import AdaptiveHeunSolver
    from torchdiffeq._impl.dopri8 import Dopri8Solver

    for name, method in (("dopri8", Dopri8Solver), ("adaptive_heun", AdaptiveHeunSolver)):
        tableau, theirs = TABLEAUS[name], method.tableau
        for row, expected in zip(tableau.a[1:], theirs.beta, strict=False):
            assert_close(row, expected[: len(row)], rtol=1e-15)
        for ours, expected in ((tableau.b, theirs.c_sol), (np.abs(tableau.b_error), theirs.c_error.abs())):
            assert_close(ours, expected[: len(ours)], rtol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_stages_are_explicit_and_fit_together(name):
    tableau = TABLEAUS[name]
    s = len(tableau.b)
    assert [len(row) for row in tableau.a] == list(range(s))
    assert len(tableau.c) == len(tableau.quadrature) == s
    assert tableau.c[0] == 0.0
    assert tableau.source
    assert tableau.name == name
    if tableau.first_same_as_last:
        assert tableau.a[-1] == tableau.b[:-1]
        assert (tableau.c[-1], tableau.b[-1]) == (1.0, 0.0)


def test_the_quadrature_of_dopri5_integrates_cubics():
    tableau = TABLEAUS["dopri5"]
    c, w = np.array(tableau.c), np.array(tableau.quadrature)
    assert_close([w @ c**k for k in range(4)], [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-14)
    assert_close(w, [1 / 12, 0, 10 / 21, 5 / 12, 0, 1 / 42, 0])


@pytest.mark.parametrize("name", METHODS)
def test_the_error_on_exponential_growth_falls_with_the_order(name):
    tableau, errors = TABLEAUS[name], []
    # where the error is not yet, and no longer, that of the leading term
    coarse = {"dopri8": 2, "tsit5": 32}.get(name, 16)
    for n in (coarse, 2 * coarse):
        x = torch.ones(1, dtype=torch.float64)
        for k in range(n):
            x, _ = step(tableau, lambda t, x: x, k / n, 1 / n, x)
        errors.append(abs(float(x) - np.e))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(tableau.order, abs=0.5 if name == "dopri8" else 0.15)


@pytest.mark.parametrize("name", METHODS)
def test_the_known_first_slope_is_not_evaluated_again(name):
    tableau, calls = TABLEAUS[name], []

    def field(t, x):
        calls.append(t)
        return torch.cos(x) + t

    x = torch.rand(3, dtype=torch.float64)
    fresh, seen = step(tableau, field, 0.5, 0.1, x)
    assert len(calls) == len(tableau.b)
    assert_close(calls, [0.5 + 0.1 * c for c in tableau.c])
    calls.clear()
    reused, again = step(tableau, field, 0.5, 0.1, x, first=seen.slopes[0])
    assert len(calls) == len(tableau.b) - 1
    assert_close(reused, fresh, rtol=0.0)
    assert_close(torch.stack(again.slopes), torch.stack(seen.slopes), rtol=0.0)


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5"])
def test_the_last_slope_is_the_first_of_the_next_step(name):
    tableau = TABLEAUS[name]
    x, seen = step(tableau, lambda t, x: torch.sin(x) * t, 0.5, 0.1, torch.rand(3, dtype=torch.float64))
    assert_close(seen.points[-1], x, rtol=0.0)
    assert_close(seen.slopes[-1], torch.sin(x) * seen.times[-1], rtol=0.0)
    assert_close(combine(seen.points[0], 0.1, tableau.b, seen.slopes), x, rtol=1e-15)


@given(shape=st.lists(st.integers(1, 3), max_size=3).map(tuple), name=st.sampled_from(METHODS), h=st.floats(-1, 1))
def test_any_shape_forwards_and_backwards(shape, name, h):
    x = torch.rand(shape, dtype=torch.float64)
    moved, seen = step(TABLEAUS[name], lambda t, y: torch.full_like(y, 2.0), 0.0, h, x)
    assert moved.shape == x.shape
    assert_close(moved, x + 2 * h, rtol=1e-12, atol=1e-15)
    assert all(point.shape == x.shape for point in seen.points)


def test_each_problem_may_have_its_own_time():
    t, x = torch.tensor([0.0, 1.0, 2.0]).double(), torch.rand(3).double()
    tableau = TABLEAUS["rk4"]
    together, _ = step(tableau, lambda t, x: x * t, t, 0.1, x)
    for i in range(3):
        assert_close(together[i], step(tableau, lambda t, x: x * t, float(t[i]), 0.1, x[i])[0], rtol=1e-15)


def test_weighted_sums_skip_zero_weights_and_leave_their_terms_alone():
    slopes = [torch.full((2,), v).double() for v in (1.0, torch.nan, 3.0)]
    before = [slope.clone() for slope in slopes]
    assert_close(weighted_sum(0.5, (2.0, 0.0, -1.0), slopes), [-0.5, -0.5])
    assert_close(combine(torch.ones(2).double(), 0.5, (2.0, 0.0, -1.0), slopes), [0.5, 0.5])
    for ours, theirs in zip(slopes, before, strict=True):
        assert_close(ours, theirs)
    with pytest.raises(ValueError, match="a sum without terms"):
        weighted_sum(0.5, (0.0, 0.0), slopes[:2])


def test_a_step_is_differentiable():
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: step(TABLEAUS["dopri5"], lambda t, x: torch.sin(x) * t, 0.5, 0.3, x)[0], x
    )


def test_stages_see_the_points_of_the_scheme():
    tableau, h = TABLEAUS["kutta3"], 0.2
    x = torch.tensor([2.0]).double()
    seen = stages(tableau, lambda t, x: x**2, 1.0, h, x)
    k1 = 4.0
    k2 = (2 + h / 2 * k1) ** 2
    k3 = (2 - h * k1 + 2 * h * k2) ** 2
    assert_close(torch.cat(seen.slopes), [k1, k2, k3], rtol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_size_may_be_a_tensor_with_a_gradient(name):
    tableau, x = TABLEAUS[name], torch.randn(2, 3, dtype=torch.float64)

    def moved(h, x):
        return step(tableau, lambda t, x: torch.sin(x) * t, 0.5, h, x)[0]

    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert_close(moved(h, x).detach(), moved(0.3, x), rtol=1e-14)
    assert torch.autograd.gradcheck(moved, (h, x.requires_grad_()))
    each = torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
    assert_close(moved(each, x)[1].detach(), moved(-0.2, x[1]).detach(), rtol=1e-14)
    assert torch.autograd.gradcheck(moved, (each, x))
    assert torch.equal(moved(torch.zeros_like(h), x), x)
