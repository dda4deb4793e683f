"""The coefficients: consistency, order, quadrature."""

import math

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.integrate.runge_kutta import step, weighted_sum
from ocnopt.integrate.tableaus import TABLEAUS, error_constant, get_tableau

METHODS = sorted(TABLEAUS)


@pytest.mark.parametrize("name", METHODS)
def test_rows_sum_to_the_nodes_and_weights_to_one(name):
    tableau = TABLEAUS[name]
    assert sum(tableau.b) == pytest.approx(1.0, abs=1e-15)
    assert sum(tableau.quadrature) == pytest.approx(1.0, abs=1e-15)
    for c, row in zip(tableau.c, tableau.a, strict=True):
        # as exact as its entries are
        assert sum(row) == pytest.approx(c, abs=2e-16 * max(10.0, sum(map(abs, row))))
    if tableau.b_error is not None:
        assert sum(tableau.b_error) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", METHODS)
def test_quadrature_is_non_negative_and_exact_to_its_degree(name):
    tableau = TABLEAUS[name]
    assert min(tableau.quadrature) >= 0.0
    degree = {"tsit5": 2, "dopri8": 5}.get(name, min(tableau.order - 1, 3))
    for power in range(degree + 1):
        total = sum(w * c**power for w, c in zip(tableau.quadrature, tableau.c, strict=True))
        assert total == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_error_falls_with_the_order(name):
    tableau = TABLEAUS[name]

    def error(n):
        x, t, h = torch.ones(1, dtype=torch.float64), 0.0, 1.0 / n
        for _ in range(n):
            x, _ = step(tableau, lambda t, x: torch.sin(x) * math.cos(t), t, h, x)
            t += h
        return float(abs(x - exact))

    exact = 2 * math.atan(math.exp(math.sin(1.0)) * math.tan(0.5))
    coarse = 3 if name == "dopri8" else 40
    measured = math.log2(error(coarse) / error(2 * coarse))
    assert measured == pytest.approx(tableau.order, abs=0.4)


@pytest.mark.parametrize("name", [name for name in METHODS if TABLEAUS[name].b_error is not None])
def test_the_error_constant_is_that_of_a_linear_field(name):
    tableau, rate, h = TABLEAUS[name], -2.0, 0.1 if name == "dopri8" else 1e-2
    x = torch.full((1,), 3.0, dtype=torch.float64)
    _, seen = step(tableau, lambda t, x: rate * x, 0.0, h, x)
    estimate = abs(float(weighted_sum(h, tableau.b_error, seen.slopes)))
    assert estimate == pytest.approx(error_constant(tableau) * abs(h * rate) ** tableau.order * 3.0, rel=0.2)


def test_an_unknown_method_offers_the_nearest():
    with pytest.raises(ProblemError, match=r"'dopry5' is unknown.*did you mean 'dopri5'"):
        get_tableau("dopry5")
