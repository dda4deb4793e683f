"""The problem class: what it accepts, what it normalises, and every sentence it refuses with."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ocnopt as oc
from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Horizon, read_horizon
from tests.oracles.compare import assert_close


def drift(t, x, u):
    return -x + u.sum(-1, keepdim=True)


def make(dynamics=drift, running_cost=None, terminal_cost=None, **options):
    settings = {"initial_state": [1.0, 2.0], "control_dim": 1, "horizon": 1.0} | options
    return OCP(dynamics, running_cost, terminal_cost, **settings)


def test_attributes():
    problem = make(
        lambda t, x, u, p: -p[..., :1] * x + u,
        initial_state=torch.ones(5, 3, 2),
        parameters=np.array([1, 2, 3]),
        control_dim=2,
        control_bounds=(-1, [1.0, 2.0]),
        parameter_bounds=(0.0, math.inf),
        horizon=Horizon(1.0, 3.0),
    )
    assert (problem.state_dim, problem.control_dim, problem.parameter_dim) == (2, 2, 3)
    assert problem.batch_shape == (5, 3)
    assert problem.device == torch.device("cpu")
    assert problem.dtype == problem.initial_state.dtype == problem.parameters.dtype == torch.float64
    assert problem.horizon == Horizon(1.0, 3.0)
    assert_close(torch.stack(problem.control_bounds), [[-1.0, -1.0], [1.0, 2.0]])
    assert_close(torch.stack(problem.parameter_bounds), [[0.0] * 3, [math.inf] * 3])


def test_a_problem_without_static_controls_has_none_of_them():
    problem = make()
    assert (problem.parameter_dim, problem.parameters, problem.parameter_bounds, problem.control_bounds) == (
        0,
        None,
        None,
        None,
    )
    assert problem.horizon == Horizon(0.0, 1.0)


def test_a_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().control_dim = 2


def test_a_function_may_need_a_parameter_for_each_problem():
    """What returns p alone in one entry has the batch's axes in a solve, but not where p is one vector."""
    start = torch.tensor([[1.0], [1.2], [0.9]]).double()

    def costing(cost, **options):
        return make(dynamics=lambda t, x, u, p: u + p[..., :1] * x, running_cost=cost, parameters=[0.1, 0.2], **options)

    wide = costing(
        lambda t, x, u, p: torch.stack([x[..., 0] ** 2, p[..., 0] ** 2, u[..., 0] ** 2], dim=-1).sum(-1),
        initial_state=start,
        path_constraint=lambda t, x, u, p: torch.stack([x[..., 0] - 5, -p[..., 1] - 1], dim=-1),
    )
    plain = costing(lambda t, x, u, p: x[..., 0] ** 2 + p[..., 0] ** 2 + u[..., 0] ** 2, initial_state=start)
    assert (wide.parameters_of_each, plain.parameters_of_each) == (True, False)
    torch.testing.assert_close(oc.solve(wide, steps=3).cost, oc.solve(plain, steps=3).cost)
    pair = [oc.differentiate(problem, controls=torch.zeros(3, 1)) for problem in (wide, plain)]
    assert_close(pair[0].p, pair[1].p)
    assert_close(pair[0].pp, pair[1].pp)
    with pytest.raises(ProblemError, match="running_cost.*stack expects each tensor to be equal size"):
        costing(lambda t, x, u, p: torch.stack([x, p]).sum(), initial_state=start)


def test_one_argument_replaced():
    problem = make(parameters=[2.0], dynamics=lambda t, x, u, p: p * x + u, control_bounds=(-1.0, 1.0))
    moved = dataclasses.replace(problem, initial_state=[5.0, 6.0], horizon=3.0)
    assert_close(moved.initial_state, [5.0, 6.0])
    assert moved.horizon == Horizon(0.0, 3.0)
    assert_close(torch.stack(moved.control_bounds), [[-1.0], [1.0]])
    assert (moved.parameter_dim, moved.parameters_broadcast) == (1, problem.parameters_broadcast)
    with pytest.raises(ProblemError, match=r"initial_state has shape \(\); expected"):
        dataclasses.replace(problem, initial_state=1.0)


def test_float32_on_request():
    problem = make(initial_state=torch.ones(2, dtype=torch.float64), dtype=torch.float32)
    assert problem.initial_state.dtype == torch.float32


def test_the_graph_of_the_arguments_is_left_behind():
    x0 = torch.ones(2, requires_grad=True)
    assert not make(initial_state=2 * x0).initial_state.requires_grad


@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    n=st.integers(1, 3),
    m=st.integers(0, 3),
    q=st.integers(0, 2),
    free=st.booleans(),
)
def test_any_shape_is_accepted(batch, n, m, q, free):
    target = torch.rand(*batch, n, dtype=torch.float64)

    def dynamics(t, x, u, *p):
        return (x - target) * t[..., None] + u.sum(-1, keepdim=True) + sum(v.sum(-1, keepdim=True) for v in p)

    problem = make(
        dynamics,
        lambda t, x, u, *p: ((x - target) ** 2).sum(-1),
        lambda t, x, *p: t,
        initial_state=torch.rand(*batch, n),
        control_dim=m,
        parameters=torch.ones(q) if q else None,
        horizon=FreeHorizon(1.0, 0.5, 2.0) if free else 1.0,
        path_constraint=lambda t, x, u, *p: x[..., :1],
        terminal_constraint=lambda t, x, *p: x - target,
    )
    assert (problem.batch_shape, problem.state_dim, problem.control_dim, problem.parameter_dim) == (batch, n, m, q)
    assert problem.parameters_broadcast


def test_whether_parameters_may_carry_leading_axes_is_found_out():
    assert make(lambda t, x, u, p: p[..., 0, None] * x, parameters=[2.0]).parameters_broadcast
    assert not make(lambda t, x, u, p: p[0] * x, parameters=[2.0]).parameters_broadcast
    assert make(lambda t, x, u, p: p * x, parameters=[2.0, 3.0]).parameters_broadcast


def test_costs_may_be_numbers_or_anything_that_broadcasts():
    make(drift, lambda t, x, u: 0.0, lambda t, x: 1, initial_state=torch.ones(4, 2))
    make(drift, lambda t, x, u: t, lambda t, x: torch.ones(1, dtype=torch.float64), initial_state=torch.ones(4, 2))


def test_a_terminal_cost_need_not_exist_at_the_start():
    make(drift, None, lambda t, x: 1 / t)
    make(drift, None, lambda t, x: 1 / t, horizon=FreeHorizon(1.0, 0.5, 2.0))


def test_a_start_at_the_edge_of_the_domain_is_accepted_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"the derivative of dynamics in x is inf at entry \(0,\) at the initial state"
    ):
        make(lambda t, x, u: torch.sqrt(x), initial_state=[0.0, 0.0, 0.0, 0.0])


def test_controls_are_clipped_to_their_bounds_before_the_functions_see_them():
    seen = []

    def dynamics(t, x, u):
        seen.append(u)
        return x * torch.log(u)

    make(dynamics, control_bounds=(1.0, 1.001))
    assert all(bool(((u >= 1) & (u <= 1.001)).all()) for u in seen)


class TestHorizon:
    def test_a_number_runs_from_zero(self):
        assert read_horizon(2) == Horizon(0.0, 2.0)

    @pytest.mark.parametrize(
        "horizon", [Horizon(1.0, 2.0), FreeHorizon(1.0, 0.5, 2.0), FreeHorizon(1.0, 1.0, 1.0, 0.5)]
    )
    def test_a_horizon_stays(self, horizon):
        assert read_horizon(horizon) is horizon

    @pytest.mark.parametrize("ends", [(1.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
    def test_empty_or_infinite(self, ends):
        with pytest.raises(ProblemError, match="is empty or infinite; expected two different finite times"):
            Horizon(*ends)

    @pytest.mark.parametrize(
        "times",
        [
            (1.0, 2.0, 3.0),
            (4.0, 2.0, 3.0),
            (2.0, 3.0, 1.0),
            (1.0, 0.0, 2.0),
            (1.0, 0.5, math.inf),
            (math.nan, 0.5, 2.0),
        ],
    )
    def test_free_times_out_of_order(self, times):
        with pytest.raises(
            ProblemError, match=r"is out of order; expected finite end times with t0 < lower <= initial"
        ):
            FreeHorizon(*times)

    @pytest.mark.parametrize("value", ["1", None, True, (0.0, 1.0)])
    def test_neither_a_number_nor_a_horizon(self, value):
        with pytest.raises(
            ProblemError, match=r"horizon is .*; expected a number T, oc.Horizon\(t0, t1\) or oc.FreeHor"
        ):
            read_horizon(value)

    def test_a_control_problem_runs_forwards(self):
        with pytest.raises(ProblemError, match="horizon runs from 2.0 to 1.0; expected an end after the start"):
            make(horizon=Horizon(2.0, 1.0))


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"initial_state": "here"}, "initial_state is str; expected numbers or a tensor"),
            (
                {"initial_state": [1.0, math.nan]},
                r"initial_state holds NaN or infinity at \(1,\); expected finite numbers",
            ),
            ({"initial_state": 1.0}, r"initial_state has shape \(\); expected \(\*batch, n\) with n >= 1"),
            ({"initial_state": torch.ones(3, 0)}, r"initial_state has shape \(3, 0\); expected \(\*batch, n\)"),
            (
                {"initial_state": torch.ones(0, 2)},
                r"initial_state has shape \(0, 2\), a batch of no problems; expected one or more",
            ),
            (
                {"initial_state": torch.ones(2, dtype=torch.complex128)},
                "initial_state is Tensor; expected numbers or a tensor .complex: write the real and the imaginary part",
            ),
            ({"parameters": np.ones(2, dtype=complex)}, r"parameters is ndarray; expected numbers .* \(complex: write"),
            (
                {"control_bounds": (0.0, np.complex128(1j))},
                r"control_bounds\[1\] is .*1j.*; expected a number or a vector",
            ),
            (
                {"parameters": [[1.0]]},
                r"parameters has shape \(1, 1\); expected a flat vector .*use torch.cat of flattened",
            ),
            ({"parameters": []}, r"parameters has shape \(0,\); expected a flat vector \(q,\) with q >= 1"),
            ({"parameters": [math.inf]}, r"parameters holds NaN or infinity at \(0,\)"),
            ({"control_dim": -1}, "control_dim is -1; expected an integer >= 0"),
            ({"control_dim": True}, "control_dim is True; expected an integer >= 0"),
            ({"dtype": torch.int64}, "dtype is torch.int64; expected a floating-point dtype such as torch.float64"),
        ],
    )
    def test_wrong(self, options, message):
        with pytest.raises(ProblemError, match=message):
            make(**options)

    @pytest.mark.parametrize("value", ["a", 3])
    def test_a_guess_that_is_none(self, value):
        with pytest.raises(ProblemError, match=f"initial_guess is {value!r}; expected a mapping with any of controls"):
            checks.start_guess(value)

    @pytest.mark.parametrize("value", [1.0, (1.0,), (0.0, 1.0, 2.0), torch.tensor(1.0), torch.ones(3)])
    def test_bounds_that_are_no_pair(self, value):
        with pytest.raises(
            ProblemError, match=r"control_bounds is .*; expected a pair \(lower, upper\) of scalars or of vec"
        ):
            make(control_bounds=value)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            (
                ([0.0, 0.0, 0.0], 1.0),
                r"control_bounds\[0\] is \[0.0, 0.0, 0.0\]; expected a number or a vector of 2 numbers",
            ),
            ((0.0, "high"), r"control_bounds\[1\] is 'high'; expected a number or a vector of 2 numbers"),
            ((0.0, math.nan), r"control_bounds\[1\] holds NaN; expected numbers \(use float\('inf'\)"),
            (
                ([0.0, 2.0], [1.0, 1.0]),
                "control_bounds: lower 2.0 exceeds upper 1.0 at entry 1; expected lower <= upper",
            ),
        ],
    )
    def test_wrong_bounds(self, bounds, message):
        with pytest.raises(ProblemError, match=message):
            make(control_dim=2, control_bounds=bounds)

    def test_bounds_without_such_controls(self):
        with pytest.raises(
            ProblemError, match="control_bounds is given for a problem without such controls; expected none"
        ):
            make(control_dim=0, control_bounds=(0.0, 1.0))
        with pytest.raises(ProblemError, match="parameter_bounds is given for a problem without such controls"):
            make(parameter_bounds=(0.0, 1.0))

    def test_a_dtype_by_name(self):
        with pytest.raises(
            ProblemError, match="dtype is 'float32'; expected a floating-point dtype such as torch.float64"
        ):
            checks.start([1.0], None, "float32")

    def test_what_is_no_function(self):
        with pytest.raises(ProblemError, match="dynamics is NoneType; expected a function of plain torch code"):
            checks.callable_or_none("dynamics", None, required=True)
        with pytest.raises(ProblemError, match="running_cost is int; expected a function"):
            checks.callable_or_none("running_cost", 3)


class TestFunctions:
    def test_wrong_signature(self):
        with pytest.raises(
            ProblemError,
            match=r"dynamics\(t, x, u\) failed .* shapes \(\), \(2,\), \(1,\): TypeError.*takes \(t, x, u\)",
        ):
            make(lambda t, x: x)
        with pytest.raises(ProblemError, match=r"terminal_cost\(t, x, p\) failed .*that takes \(t, x, p\)"):
            make(lambda t, x, u, p: x, None, lambda t, x: x, parameters=[1.0])

    def test_an_error_inside_is_the_cause(self):
        def dynamics(t, x, u):
            raise KeyError("wind")

        with pytest.raises(ProblemError, match="dynamics.*KeyError: 'wind'") as caught:
            make(dynamics)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_our_own_errors_pass_through(self):
        def dynamics(t, x, u):
            raise ProblemError("my own words")

        with pytest.raises(ProblemError, match="^my own words$"):
            make(dynamics)

    def test_a_captured_float32_matrix(self):
        matrix = torch.ones(2, 2)
        with pytest.raises(
            ProblemError, match="dtype.*a float32 tensor captured in a float64 problem is the usual cause"
        ):
            make(lambda t, x, u: x @ matrix)

    def test_float32_output(self):
        with pytest.raises(
            ProblemError, match=r"dynamics returned dtype torch.float32; expected torch.float64: a float32 tensor cap"
        ):
            make(lambda t, x, u: torch.zeros(x.shape))
        with pytest.raises(ProblemError, match=r"running_cost returned dtype torch.float32; expected torch.float64"):
            make(drift, lambda t, x, u: torch.zeros(x.shape[:-1]))

    def test_no_tensor(self):
        with pytest.raises(ProblemError, match=r"dynamics returned list; expected a tensor: end with torch.stack"):
            make(lambda t, x, u: [x[..., 0], x[..., 1]])
        with pytest.raises(ProblemError, match="terminal_cost returned NoneType; expected a tensor"):
            make(drift, None, lambda t, x: None)

    def test_wrong_shape(self):
        with pytest.raises(ProblemError, match=r"dynamics returned shape \(1,\); expected \(2,\): index the last axis"):
            make(lambda t, x, u: x[..., :1])
        with pytest.raises(
            ProblemError, match=r"dynamics returned shape \(2, 3\); expected \(3, 2\).*torch.stack\(\[...\], dim=-1\)"
        ):
            make(lambda t, x, u: torch.stack([x[..., 0], x[..., 1]]), initial_state=torch.ones(3, 2))

    @pytest.mark.parametrize("batch", [(), (3,), (1,), (2, 3)])
    def test_a_cost_with_an_axis_too_many(self, batch):
        with pytest.raises(
            ProblemError,
            match=r"running_cost returned shape .*expected one number per state, shape .*the last axis \(sum\(-1\)\)",
        ):
            make(drift, lambda t, x, u: (x**2).sum(-1, keepdim=True), initial_state=torch.ones(*batch, 2))

    def test_a_cost_summed_over_the_batch(self):
        with pytest.raises(
            ProblemError, match="running_cost gives other values on states stacked along a leading axis"
        ):
            make(drift, lambda t, x, u: (x**2).sum(), initial_state=torch.ones(3, 2))

    @pytest.mark.parametrize("name", ["path_constraint", "terminal_constraint"])
    def test_a_constraint_is_a_vector(self, name):
        with pytest.raises(ProblemError, match=rf"{name} returned shape \(\); expected \(\) and one last axis"):
            make(**{name: lambda t, x, *u: x[..., 0]})

    def test_leading_axes_mixed(self):
        with pytest.raises(
            ProblemError, match=r"dynamics gives other values .*\(row 0\); expected the same: use the last axis only"
        ):
            make(lambda t, x, u: x - x.mean(), initial_state=torch.rand(3, 2))
        with pytest.raises(ProblemError, match=r"terminal_constraint gives other values"):
            make(terminal_constraint=lambda t, x: x - x.mean())

    def test_randomness(self):
        with pytest.raises(ProblemError, match="dynamics gives other values .*no randomness"):
            make(lambda t, x, u: x + torch.randn_like(x))

    def test_not_finite_at_the_start(self):
        with pytest.raises(
            ProblemError,
            match=r"dynamics returned inf at entry \(1,\) of its output at the initial state; .*function's domain",
        ):
            make(lambda t, x, u: 1 / (x - 2.0))
        with pytest.raises(
            ProblemError, match=r"running_cost returned nan at entry \(\) of its output at the initial state"
        ):
            make(drift, lambda t, x, u: torch.log(-x[..., 0]))
