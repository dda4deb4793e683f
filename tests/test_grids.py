"""Steps between given times: against equal steps, a closed form, and each other's solver."""

import pytest
import torch

import ocnopt as oc

F64 = torch.float64


def pendulum(**options):
    given = {"initial_state": [1.0, 0.0], "control_dim": 1, "horizon": oc.Horizon(0.5, 2.5)} | options
    return oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + t * u[..., 0]], dim=-1),
        lambda t, x, u: (x**2).sum(-1) + t * (u**2).sum(-1),
        lambda t, x: t * (x**2).sum(-1),
        **given,
    )


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_equal_times_are_equal_steps(solver):
    bounds = {"control_bounds": lambda t: (-2.0 + t, 2.0), "path_constraint": lambda t, x, u: x[..., :1] - 1.2 + 0 * t}
    times = torch.linspace(0.5, 2.5, 9, dtype=F64)
    pair = [oc.solve(pendulum(**bounds), solver, steps=steps) for steps in (8, times)]
    assert all(bool(solution.converged) for solution in pair)
    assert float(pair[1].cost) == pytest.approx(float(pair[0].cost), rel=1e-9)
    assert pair[1].times.tolist() == times.tolist()
    assert float(pair[1].horizon) == 2.5
    assert torch.allclose(pair[1].states, pair[0].states, atol=1e-6)
    assert pair[1].violations == ()


def test_both_solvers_agree_on_unequal_steps():
    times = [0.5, 0.6, 0.75, 1.0, 1.4, 2.5]
    pair = [oc.solve(pendulum(), solver, steps=times, integrator="midpoint") for solver in ("ddp", "casadi")]
    assert float(pair[0].cost) == pytest.approx(float(pair[1].cost), rel=1e-8)
    assert torch.allclose(pair[0].controls, pair[1].controls, atol=1e-5)


def test_a_step_is_that_of_the_tableau():
    """Euler by hand, with a parameter and a batch."""
    problem = oc.OCP(
        lambda t, x, u, p: p * x + t[..., None] * u,
        lambda t, x, u, p: t * (x**2).sum(-1),
        initial_state=[[1.0], [2.0]],
        control_dim=1,
        horizon=1.0,
        parameters=[0.5],
    )
    staged = oc.transcribe(problem, [0.0, 0.2, 1.0], "euler")
    x, u = problem.initial_state, torch.ones(2, 1, dtype=F64)
    p = staged.start_parameters()
    x_next, cost = staged.advance(staged.groups[0].stage, torch.tensor(1), x, u, p)
    assert x_next[:, 0].tolist() == pytest.approx([1 + 0.8 * (0.5 + 0.2), 2 + 0.8 * (1 + 0.2)])
    assert cost.tolist() == pytest.approx([0.8 * 0.2 * 1, 0.8 * 0.2 * 4])
    assert bool(oc.solve(staged).converged.all())


def test_least_energy_on_any_grid():
    """From 1 to 0 in time 1 with cost u^2: u = -1 on every step, whatever its length; the cost is 1."""
    problem = oc.OCP(
        lambda t, x, u: u,
        lambda t, x, u: (u**2).sum(-1),
        initial_state=[1.0],
        control_dim=1,
        horizon=1.0,
        terminal_constraint=lambda t, x: x,
    )
    for solver in ("ddp", "casadi"):
        solution = oc.solve(problem, solver, steps=[0.0, 0.05, 0.3, 1.0])
        assert float(solution.cost) == pytest.approx(1.0, rel=1e-7)
        assert solution.controls[:, 0].tolist() == pytest.approx([-1.0] * 3, abs=1e-6)
        assert solution.states[:, 0].tolist() == pytest.approx([1.0, 0.95, 0.7, 0.0], abs=1e-6)
        assert float(solution.policy(0.2, torch.tensor([0.8], dtype=F64))) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([0.5, 1.0], {}, "times from 0.5 to 1; expected them to run from 0.5 to 2.5"),
        ([0.5, 2.0, 1.0, 2.5], {}, "not one after the other; expected them to run from 0.5 to 2.5"),
        ([[0.5, 2.5]], {}, r"steps has shape \(1, 2\); expected a whole number, or a row"),
        ([0.5, 2.5], {"integrator": "radau2"}, "the integrator 'radau2' is implicit; expected an explicit one"),
        ([0.5, 2.5], {"solver": "indirect"}, "with a whole number of steps, or use solver='ddp'"),
    ],
)
def test_what_is_refused(steps, options, message):
    with pytest.raises(oc.ProblemError, match=message):
        oc.solve(pendulum(), **{"solver": "ddp", "steps": steps} | options)


def test_a_free_end_and_a_control_loop_are_refused():
    free = pendulum(horizon=oc.FreeHorizon(2.5, 2.0, 3.0, t0=0.5))
    with pytest.raises(oc.ProblemError, match="the end time is free; expected a whole number of steps"):
        oc.solve(free, steps=[0.5, 2.5])
    with pytest.raises(oc.ProblemError, match="MPC got steps that are given as times; expected equal ones"):
        oc.MPC(oc.prepare(pendulum(), steps=[0.5, 1.0, 2.5], kernel="torch"))
