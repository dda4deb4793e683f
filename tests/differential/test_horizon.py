"""The formulas at the end of the path and the lifted problem are two routes to the same derivatives in T."""

import pytest
import torch

from ocnopt.differential.differentiate import differentiate
from ocnopt.ocp import OCP, FreeHorizon
from tests.differential.cases import CASES, case, expansion
from tests.differential.end_time import end_time_derivatives
from tests.oracles.compare import relative_error

FREE = [name for name, make in CASES.items() if "horizon" in name or name == "parameters_as_one_vector_in_a_batch"]


@pytest.mark.parametrize("name", FREE)
def test_both_routes_agree(name):
    problem = case(name).problem
    formulas, lifted = end_time_derivatives(problem), expansion(name, "exact")
    assert relative_error(formulas.T, lifted.T) <= 1e-6
    assert relative_error(formulas.TT, lifted.TT) <= 1e-6
    if problem.parameter_dim:
        assert relative_error(formulas.Tp, lifted.Tp) <= 1e-6
    else:
        assert formulas.Tp.shape == (0,)


def test_differences_of_the_cost_in_T_and_p():
    problem = CASES["free_horizon_without_running_cost"]().problem
    p, T, h = problem.parameters, 1.1, 1e-4
    formulas = end_time_derivatives(problem, parameters=p, horizon=T)

    def result(T):
        return differentiate(problem, parameters=p, horizon=T, curvature="gauss_newton", rtol=1e-9, atol=1e-9)

    later, earlier = result(T + h), result(T - h)
    assert relative_error(formulas.T, (later.value - earlier.value) / (2 * h)) <= 1e-6
    assert relative_error(formulas.TT, (later.T - earlier.T) / (2 * h)) <= 1e-6
    assert relative_error(formulas.Tp, (later.p - earlier.p) / (2 * h)) <= 1e-6


def test_minimum_of_a_closed_form():
    """x = 1 + T and Phi = (x - 3)^2 + T: stationary at T = 3/2."""
    problem = OCP(lambda t, x, u: torch.ones_like(x), None, lambda t, x: (x[..., 0] - 3) ** 2 + t, initial_state=[1.0],
                  horizon=FreeHorizon(1.5, 0.5, 2.0))  # fmt: skip
    T, TT, _ = end_time_derivatives(problem)
    assert float(T) == pytest.approx(0.0, abs=1e-9)
    assert float(TT) == pytest.approx(2.0)
