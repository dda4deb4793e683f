"""The "shooting" solver: derivatives against finite differences, optima against DDP and closed forms, refusals."""

import math

import numpy as np
import pytest
import torch

import ocnopt as oc
from ocnopt.paths import Widened
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.descent import METHODS, Search
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.shooting import Shooting
from ocnopt.solvers.shot import Shot, find_direction, first_point
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import assert_converged, free_end, pendulum, pushed, regulator, scalar_lqr, swing


def shot_of(problem, steps=6):
    staged = oc.transcribe(problem, steps) if isinstance(problem, oc.OCP) else problem
    guess = read_guess(staged, None)
    shot = Shot(staged, DDP().make_kernel(Widened(staged), guess))
    return shot, first_point(shot, guess)


def differences(function, v, h=1e-5):
    rows = [(np.asarray(function(v + h * e)) - np.asarray(function(v - h * e))) / (2 * h) for e in np.eye(v.size)]
    return np.stack(rows, axis=-1)


@pytest.mark.parametrize(
    "make", [swing, free_end, lambda: swing(control_bounds=(-3.0, 3.0))], ids=["plain", "free", "box"]
)
def test_gradient_and_hessian_against_finite_differences(make):
    shot, v = shot_of(make())
    v = v + 0.1 * np.random.default_rng(0).standard_normal(v.size)
    assert_close(shot.gradient(v), differences(shot.cost, v), rtol=1e-6, atol=1e-7)
    hessian = shot.curvature(v, np.ones(1))(np.eye(v.size))
    assert_close(hessian, differences(shot.gradient, v), rtol=1e-6, atol=1e-6)
    dv = np.arange(1.0, 1 + v.size)
    assert_close(shot.curvature(v, np.ones(1))(dv), hessian @ dv, rtol=1e-12, atol=1e-12)


def test_the_feedback_law_changes_the_unknowns_not_the_problem():
    shot, v = shot_of(swing(), steps=20)
    plain = Shot(shot.problem, shot.kernel)
    path = shot.path(v + 0.3)
    assert_close(plain.cost(plain.join(path.controls, path.states[0, 2:])), shot.cost(v + 0.3), rtol=1e-13)


def test_terminal_derivatives_against_finite_differences():
    shot, v = shot_of(swing(terminal_constraint=lambda t, x: torch.stack([torch.sin(x[..., 0]), x[..., 1] ** 2], -1)))
    assert_close(shot.end_jacobian(v), differences(shot.end_error, v), rtol=1e-6, atol=1e-7)
    nu = np.array([0.0, 0.7, -0.4])
    expected = differences(lambda at: shot.end_jacobian(at).T @ nu[1:], v)
    assert_close(shot.curvature(v, nu)(np.eye(v.size)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q", [0, 2])
def test_affine_quadratic_problems(q):
    case = random_affine_quadratic(3, N=5, n=3, m=2, q=q)
    states, controls, p, cost = case.solve()
    solution = oc.solve(case.staged(), "shooting")
    assert_converged(solution)
    assert_close(solution.cost, cost, rtol=1e-12)
    assert_close(solution.controls, controls, rtol=1e-6, atol=1e-7)
    assert_close(solution.states, states, rtol=1e-6, atol=1e-7)
    assert_close(solution.parameters, p, rtol=1e-6, atol=1e-7)
    assert solution.gains is None


def test_costates_are_those_of_ddp():
    ours, ddp = (oc.solve(regulator(), name, steps=20) for name in ("shooting", "ddp"))
    assert_close(ours.costates, ddp.costates, rtol=1e-7, atol=1e-8)


@pytest.fixture(scope="module")
def optimum():
    return oc.solve(swing(), steps=20).cost


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_optimum_of_ddp(method, optimum):
    solution = oc.solve(swing(), "shooting", steps=20, method=method)
    assert_converged(solution)
    assert_close(solution.cost, optimum, rtol=1e-7)
    assert f"({method})" in solution.status


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP"])
def test_bounds(method):
    problem = swing(control_bounds=(-1.5, 0.4))
    ddp = oc.solve(problem, steps=20)
    solution = oc.solve(problem, "shooting", steps=20, method=method)
    assert_converged(solution)
    assert_close(solution.cost, ddp.cost, rtol=1e-7)
    assert_close(solution.controls, ddp.controls, rtol=1e-3, atol=1e-3)
    assert float(solution.controls.min()) >= -1.5
    assert float(solution.controls.max()) <= 0.4
    assert bool((ddp.controls == 0.4).any())


def test_static_parameters_and_a_free_end_time():
    problem = free_end()
    ddp, ours = oc.solve(problem, steps=20), oc.solve(problem, "shooting", steps=20)
    assert_converged(ours)
    assert_close(ours.cost, ddp.cost, rtol=1e-10)
    assert_close(ours.horizon, ddp.horizon, rtol=1e-5)
    assert_close(ours.parameters, ddp.parameters, rtol=1e-5)


@pytest.mark.parametrize("method", ["trust-exact", "BFGS", "L-BFGS-B"])
def test_static_parameters_alone(method):
    """A decay x(1) = x(0) exp(-p) that is to end at 1/4."""
    problem = oc.OCP(
        lambda t, x, u, p: -p * x,
        None,
        lambda t, x, p: ((x - 0.25) ** 2).sum(-1),
        initial_state=[1.0],
        horizon=1.0,
        parameters=[0.5],
    )
    solution = oc.solve(problem, Shooting(method=method), steps=20)
    assert_converged(solution)
    assert solution.parameters.item() == pytest.approx(math.log(4.0), rel=1e-6)


def test_an_error_of_the_users_is_not_taken_for_scipys():
    calls = []

    def cost(t, x, u):
        calls.append(1)
        if len(calls) > 60:
            raise ValueError("a table has no such entry")
        return (x**2 + u**2).sum(-1)

    problem = oc.OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0)
    with pytest.raises(ValueError, match="a table has no such entry"):
        oc.solve(problem, "shooting", steps=10)


def test_a_bound_on_a_parameter_and_on_the_end_time():
    problem = free_end(parameter_bounds=(-0.6, 0.6))
    ddp, ours = oc.solve(problem, steps=20), oc.solve(problem, "shooting", steps=20)
    assert_converged(ours)
    assert_close(ours.cost, ddp.cost, rtol=1e-9)
    assert float(ours.parameters) == -0.6


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_a_terminal_constraint(method):
    steps = 20
    problem = oc.problems.get("double_integrator_min_energy").build()
    ours = oc.solve(problem, "shooting", steps=steps, method=method)
    casadi = oc.solve(problem, "casadi", steps=steps)
    assert_close(ours.cost, 6 / (1 - steps**-2), rtol=1e-9)
    assert bool(ours.converged)
    assert float(ours.constraint_violation) < 1e-9
    assert_close(ours.costates, casadi.costates, rtol=1e-5, atol=1e-5)
    assert set(ours.multipliers) == {"terminal_constraint"}
    assert_close(ours.multipliers["terminal_constraint"], casadi.multipliers["terminal_constraint"], rtol=1e-5)


def test_multipliers_where_all_controls_are_at_a_bound():
    problem = pushed(
        lambda t, x, u: 1 + (u**2).sum(-1),
        initial_state=[[1.0], [0.4]],
        control_bounds=(-0.5, 2.0),
        horizon=oc.FreeHorizon(1.0, 0.2, 5.0),
        terminal_constraint=lambda t, x: torch.sin(x),
    )
    ours = oc.solve(problem, "shooting", steps=5)
    assert bool(ours.converged.all())
    assert_close(ours.horizon, [2.0, 0.8], rtol=1e-9)
    # 1 + u^2 + nu x' = 0, as T is free
    assert_close(ours.multipliers["terminal_constraint"], [[2.5], [2.5]], rtol=1e-9)
    assert oc.solve(scalar_lqr(), "shooting", steps=3).multipliers is None


@pytest.mark.parametrize("name", ["pendulum_swing_up", "pendulum_swing_up_u5", "scalar_lqr", "mimo_lqr_two_masses"])
def test_the_library_as_ddp_solves_it(name):
    problem = oc.problems.get(name).build()
    ddp, ours = oc.solve(problem, steps=50), oc.solve(problem, "shooting", steps=50)
    assert_converged(ours)
    assert_close(ours.cost, ddp.cost, rtol=1e-7)


def test_sizes_that_vary():
    stages = [
        Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
        Stage(lambda k, x, u: torch.sin(x) + u, lambda k, x, u: (u**2).sum(-1), 2),
    ]
    problem = StagedOCP(stages, lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5])
    ddp, ours = oc.solve(problem), oc.solve(problem, "shooting")
    assert bool(ours.converged)
    assert_close(ours.cost, ddp.cost, rtol=1e-9)
    assert [u.shape[-1] for u in ours.controls] == [1, 2]
    assert [x.shape[-1] for x in ours.costates] == [1, 2, 2]


def test_a_batch_of_stages_with_parameters_and_captured_data():
    target = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    stages = [
        Stage(lambda k, x, u, p: x + u * p, lambda k, x, u, p: (u**2).sum(-1), 1),
        Stage(lambda k, x, u, p: torch.sin(x) + u, lambda k, x, u, p: ((x - target) ** 2 + u**2).sum(-1), 1),
    ]
    problem = StagedOCP(
        stages, lambda x, p: (x**2 + (p - 1) ** 2).sum(-1), initial_state=[[1.0], [0.3]], parameters=[0.7]
    )
    ours, ddp = oc.solve(problem, "shooting"), oc.solve(problem)
    assert_converged(ours)
    assert_close(ours.cost, ddp.cost, rtol=1e-9)
    assert_close(ours.parameters, ddp.parameters, rtol=1e-4)


def test_it_leaves_a_saddle():
    shot, v = shot_of(pendulum(initial_guess={"controls": torch.zeros(20, 1)}), steps=20)
    assert float(np.abs(shot.gradient(v)).max()) < 1e-12
    search = Search(Shooting(), "trust-exact", shot, Stopwatch(None), progress=False)
    search.run(v)
    assert search.saddles == 1
    assert search.costs[0] == pytest.approx(2.0)
    assert search.costs[-1] < 1.0
    assert search.remaining() < 1e-6
    assert "of them away from a saddle" in search.attempt(0.0).status


def test_a_start_with_states_is_made_a_path():
    problem = oc.problems.get("pendulum_swing_up").build()
    solution = oc.solve(problem, "shooting", steps=100)
    assert float(solution.history["cost"][0]) < 3.0
    assert int(solution.iterations) < 20


def test_no_sweep_no_feedback_law():
    concave = pushed(lambda t, x, u: -(u**2).sum(-1) - (x**2).sum(-1), control_bounds=(-1.0, 1.0))
    shot, v = shot_of(concave)
    path = shot.path(v)
    assert find_direction(shot.wide, path) is None or not bool(torch.isnan(find_direction(shot.wide, path).K).any())
    solution = oc.solve(concave, "shooting", steps=6)
    assert set(solution.controls.abs().reshape(-1).tolist()) == {1.0}


def test_a_batch_with_a_bad_problem():
    problem = pushed(lambda t, x, u: (torch.exp(x**2) + u**2).sum(-1), initial_state=[[1.0], [0.7], [0.5]])
    start = torch.zeros(3, 6, 1)
    start[1] = 90.0
    solution = oc.solve(problem, "shooting", steps=6, initial_guess=start)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.status[1].startswith("given up: the cost of the first path is inf")
    assert math.isnan(float(solution.cost[1]))
    for row, x0 in ((0, 1.0), (2, 0.5)):
        alone = oc.solve(pushed(problem.running_cost, initial_state=[x0]), "shooting", steps=6)
        assert_close(solution.cost[row], alone.cost, rtol=1e-12)
        assert_close(solution.controls[row], alone.controls, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_data_of_each_problem_may_be_captured(shape):
    target = torch.tensor([0.1, 2.0, 1.5], dtype=torch.float64).reshape(*shape, 1)
    x0 = torch.ones(*shape, 1, dtype=torch.float64)

    def cost(t, x, u):
        return ((x - target) ** 2 + u**2).sum(-1)

    ours, ddp = (oc.solve(pushed(cost, initial_state=x0), name, steps=8) for name in ("shooting", "ddp"))
    assert_converged(ours)
    assert_close(ours.cost, ddp.cost, rtol=1e-10)


def test_the_iteration_limit():
    solution = oc.solve(swing(), "shooting", steps=20, max_iterations=1)
    assert not bool(solution.converged)
    assert int(solution.iterations) == 1
    assert solution.status.startswith("stopped after 1 step: the iteration limit was reached; the gradient is still ")
    assert solution.status.endswith("raise max_iterations, or start from this solution (trust-exact)")
    assert solution.history["cost"].shape == solution.history["step"].shape == (2,)


def test_an_unbounded_cost_does_not_hang():
    with pytest.warns(UserWarning, match="stationary"):
        solution = oc.solve(pushed(lambda t, x, u: -(u**2).sum(-1)), "shooting", steps=4, max_iterations=30)
    assert not bool(solution.converged)
    assert solution.status.startswith("stopped after ")


def test_progress_is_printed(capsys):
    oc.solve(scalar_lqr(), "shooting", steps=4, progress=True)
    assert capsys.readouterr().out.splitlines()[0].startswith("   1  cost 0.76")


def test_a_first_path_that_is_not_finite():
    problem = pushed(lambda t, x, u: (torch.exp(x**2) + u**2).sum(-1))
    with pytest.raises(oc.NonFiniteError, match="the cost of the first path is inf"):
        oc.solve(problem, "shooting", steps=4, initial_guess=torch.full((4, 1), 90.0))


def test_a_derivative_that_is_no_number():
    with pytest.warns(UserWarning, match="the derivative of running_cost in u is nan"):
        problem = pushed(lambda t, x, u: (torch.sqrt(u**2) ** 3 + x**2).sum(-1))
    solution = oc.solve(problem, "shooting", steps=4, initial_guess=torch.zeros(4, 1))
    assert not bool(solution.converged)
    assert "a derivative is NaN or infinite; the gradient is still inf" in solution.status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "newton"},
            r"method is 'newton'; expected 'auto' or 'trust-exact' or .*; did you mean 'Newton-CG'\?",
        ),
        ({"max_iterations": 0}, "max_iterations of Shooting is 0; expected max_iterations >= 1, a whole number"),
        ({"tolerance": 0.0}, "tolerance of Shooting is 0.0; expected tolerance > 0 and finite"),
        ({"tolerence": 1e-3}, "solver 'shooting' has no option 'tolerence'; .* did you mean 'tolerance'?"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(oc.ProblemError, match=message):
        oc.solve(scalar_lqr(), "shooting", **options)


def test_what_torch_cannot_differentiate_twice_is_an_error():
    problem = pushed(lambda t, x, u: torch.cdist(x[..., None, :], 0 * x[..., None, :] + 2)[..., 0, 0] + u[..., 0] ** 2)
    with pytest.raises(oc.ProblemError, match="an operation that torch cannot differentiate twice"):
        oc.solve(problem, "shooting", steps=4)


def test_refusals_name_what_can():
    bounded = scalar_lqr(control_bounds=(-1.0, 1.0))
    with pytest.raises(
        oc.ProblemError, match=r"has control_bounds.*, which method 'Newton-CG'.* does not take: use one "
    ):
        oc.solve(bounded, "shooting", method="Newton-CG")
    ended = scalar_lqr(terminal_constraint=lambda t, x: x)
    with pytest.raises(
        oc.ProblemError, match=r"has a terminal_constraint, .*: use one of trust-constr, SLSQP, or solver"
    ):
        oc.solve(ended, "shooting", method="L-BFGS-B")
    along = scalar_lqr(path_constraint=lambda t, x, u: x - 2)
    with pytest.raises(
        oc.ProblemError, match=r"has path_constraint; solver 'shooting' .* use solver='ddp' or 'casadi'"
    ):
        oc.solve(along, "shooting")


def test_bounds_in_float32_end_at_what_it_resolves():
    problem = oc.OCP(
        lambda t, x, u: torch.sin(x) + u,
        lambda t, x, u: (x**2 + 0.1 * u**2).sum(-1),
        initial_state=[1.5],
        control_dim=1,
        horizon=5.0,
        control_bounds=(-1.2, 1.0),
        dtype=torch.float32,
    )
    solution = oc.solve(problem, "shooting", steps=12, integrator="euler", time_limit=2.0)
    assert bool(solution.converged)
    assert "to what torch.float32 resolves, a gradient of" in solution.status
    assert float(solution.cost) == pytest.approx(5.1867838, rel=1e-6)
