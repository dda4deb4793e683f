"""The implicit steps for stiff fields."""

import math

import pytest
import torch

from ocnopt.integrate.adaptive import integrate
from ocnopt.integrate.runge_kutta import step
from ocnopt.integrate.tableaus import IMPLICIT, STIFF, TABLEAUS

METHODS = sorted(STIFF)


@pytest.mark.parametrize("name", METHODS)
def test_the_tableau(name):
    tableau = STIFF[name]
    assert tableau.is_solved_in_turn
    assert not any(other.is_solved_in_turn for other in (*IMPLICIT.values(), *TABLEAUS.values()))
    assert sum(tableau.b) == pytest.approx(1.0, abs=1e-15)
    assert sum(tableau.b_error) == pytest.approx(0.0, abs=1e-15)
    assert tableau.a[-1] == tableau.b
    for c, row in zip(tableau.c, tableau.a, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    assert min(tableau.quadrature) >= 0.0
    for power in range(3):
        total = sum(w * c**power for w, c in zip(tableau.quadrature, tableau.c, strict=True))
        assert total == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_error_falls_with_the_order(name):
    def end(count):
        x, t, h = torch.tensor([1.0, 0.5], dtype=torch.float64), 0.0, 2.0 / count
        for _ in range(count):
            x, _ = step(STIFF[name], lambda t, x: torch.stack([x[1], math.cos(t) - torch.sin(x[0])]), t, h, x)
            t += h
        return x

    right = end(40)
    coarse, fine = (float((end(count) - right).abs().max()) for count in (5, 10))
    assert math.log2(coarse / fine) == pytest.approx(STIFF[name].order, abs=0.3)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("name", METHODS)
def test_a_linear_field_is_damped_however_stiff(name, shape):
    """L-stable: R(z) falls as z goes to minus infinity; samples of any shape."""
    x = torch.ones(shape, dtype=torch.float64)
    sizes = []
    for rate in (1e2, 1e5, 1e9):
        end, seen = step(STIFF[name], lambda t, x: -rate * x, 0.0, 1.0, x)  # noqa: B023
        sizes.append(float(end.abs().max()))
        assert seen.slopes[-1].shape == x.shape
    assert sizes[0] > 10 * sizes[1] > 100 * sizes[2]


def test_a_sample_without_a_solution_leaves_none():
    x = torch.tensor([[0.0], [-1.0]], dtype=torch.float64)
    end, _ = step(STIFF["kvaerno5"], lambda t, x: x**2 + torch.tensor([[1.0], [0.0]]), 0.0, 1.5, x)
    assert end.isnan().all()


def test_a_step_without_a_solution_is_rejected_until_there_is_one():
    """An equation of a stage has no real solution where the step is long."""
    walk = integrate(
        lambda t, x: x**2 + 1,
        torch.zeros(1, dtype=torch.float64),
        (0.0, 1.5),
        tableau=STIFF["kvaerno5"],
        first_size=1.5,
    )
    assert walk.rejected > 0
    torch.testing.assert_close(walk.state, torch.tensor([math.tan(1.5)]).double(), rtol=0.05, atol=0.0)
    assert walk.evaluations > 7 * walk.steps
