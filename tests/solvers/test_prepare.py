"""A prepared problem solves from any state and with any data what a fresh solve would."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.endings import History, Tables
from ocnopt.solvers.lowered import problem as problem_module
from ocnopt.solvers.lowering.lowering import lower
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close
from tests.solvers.cases import swing

F64 = torch.float64
SOLVERS = [
    ("ddp", {"kernel": "torch"}),
    ("ddp", {"kernel": "lowered"}),
    ("casadi", {}),
    ("casadi", {"method": "collocation"}),
]
STEPS = 12
FUNCTIONS = ("dynamics", "running_cost", "terminal_cost", "path_constraint", "terminal_constraint")


def pendulum(target, mass, batch=(), **changes):
    """A pendulum with a target and a mass among its data."""

    def dynamics(t, x, u):
        return torch.stack([x[..., 1], (u[..., 0] - 2 * torch.sin(x[..., 0])) / mass], dim=-1)

    def cost(t, x, u):
        return ((x - target) ** 2).sum(-1) + 0.1 * (u**2).sum(-1)

    start = torch.tensor([0.5, -0.2], dtype=F64).expand(*batch, 2)
    given = {"initial_state": start, "control_dim": 1, "horizon": 1.0, "data": (target, mass)}
    return OCP(dynamics, cost, lambda t, x: 3 * ((x - target) ** 2).sum(-1), **{**given, **changes})


def tracking(target, **changes):
    """min of the integral of (x - target)^2 + u^2 from x = target + 1, T = 1: tanh(1)."""
    given = {"initial_state": [1.0], "control_dim": 1, "horizon": 1.0, "data": (target,), **changes}
    return OCP(lambda t, x, u: u, lambda t, x, u: ((x - target) ** 2 + u**2).sum(-1), **given)


def fresh(target, mass, start, solver, options, **changes):
    """The answer of a problem made from the present numbers."""
    problem = pendulum(target.clone(), mass.clone(), start.shape[:-1], initial_state=start, **changes)
    return solve(problem, solver, steps=STEPS, **options)


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_other_states_and_data(solver, options):
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass), solver, steps=STEPS, **options)
    for start, goal, weight in (([0.5, -0.2], 0.3, 1.0), ([-0.4, 0.1], 0.3, 1.0), ([0.0, 0.6], -0.5, 1.7)):
        target[0] = goal
        mass.fill_(weight)
        start = torch.tensor(start, dtype=F64)
        solution, wanted = prepared.solve(start), fresh(target, mass, start, solver, options)
        assert bool(solution.converged)
        assert float(solution.build_time) == 0.0
        torch.testing.assert_close(solution.cost, wanted.cost, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solution.states, wanted.states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(solution.states[0], start)
    torch.testing.assert_close(prepared.problem.initial_state, torch.tensor([0.5, -0.2], dtype=F64))


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_a_batch_with_data_of_each(solver, options):
    target = torch.tensor([[0.3, 0.0], [-0.2, 0.1], [0.6, 0.0]], dtype=F64)
    mass = torch.tensor([1.0, 1.5, 0.8], dtype=F64)
    prepared = prepare(pendulum(target, mass, (3,)), solver, steps=STEPS, **options)
    target += 0.1
    mass *= 1.2
    start = torch.tensor([[0.5, 0.0], [0.1, 0.2], [-0.3, 0.4]], dtype=F64)
    solution = prepared.solve(start)
    for i in range(3):
        wanted = fresh(target[i], mass[i], start[i], solver, options)
        torch.testing.assert_close(solution.cost[i], wanted.cost, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solution.states[i], wanted.states, rtol=1e-5, atol=1e-5)


def test_a_large_batch_with_data_of_each_leaves_in_another_order():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(130, 2, generator=generator, dtype=F64)
    mass = 0.7 + torch.rand(130, generator=generator, dtype=F64)
    start = torch.randn(130, 2, generator=generator, dtype=F64)
    problem = pendulum(target, mass, (130,), initial_state=start)
    solution = solve(problem, steps=STEPS, kernel="lowered")
    assert bool(solution.converged.all())
    assert len(set(solution.iterations.tolist())) > 1
    for i in (0, 17, 64, 129):
        wanted = fresh(target[i], mass[i], start[i], "ddp", {"kernel": "torch"})
        torch.testing.assert_close(solution.cost[i], wanted.cost, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["torch", "lowered"])
def test_free_end_and_bounds(kernel):
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    more = {"horizon": FreeHorizon(1.0, 0.3, 3.0), "control_bounds": (-1.0, 1.0)}
    prepared = prepare(pendulum(target, mass, **more), steps=STEPS, kernel=kernel)
    target[0] = 0.8
    start = torch.tensor([0.2, 0.1], dtype=F64)
    solution, wanted = prepared.solve(start), fresh(target, mass, start, "ddp", {"kernel": kernel}, **more)
    torch.testing.assert_close(solution.horizon, wanted.horizon, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution.cost, wanted.cost, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["torch", "lowered"])
def test_what_each_step_is_given(kernel):
    """A reference that differs from step to step and problem to problem, written as step_data."""

    def joint(k, x, u, p, row):
        return x + 0.5 * u, ((x - row) ** 2 + u**2).sum(-1)

    plain = StagedOCP(
        Stage(lambda k, x, u: x + 0.5 * u, lambda k, x, u: (u**2).sum(-1), control_dim=2),
        lambda x: (x**2).sum(-1),
        initial_state=torch.zeros(3, 2),
        steps=5,
    )
    table = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    groups = tuple(dataclasses.replace(g, stage=Stage(None, None, 2, joint)) for g in plain.groups)
    problem = plain.altered(groups=groups, terminal_cost=lambda x, row: ((x - row) ** 2).sum(-1), step_data=table)
    solution = solve(problem, kernel=kernel)
    both = [solution]
    prepared = prepare(problem.altered(step_data=torch.zeros_like(table)), kernel=kernel)
    both.append(dataclasses.replace(prepared, problem=problem).solve())
    for i in range(3):
        rows = table[:, i]
        own = StagedOCP(
            [
                Stage(lambda k, x, u: x + 0.5 * u, lambda k, x, u, r=r: ((x - r) ** 2 + u**2).sum(-1), control_dim=2)
                for r in rows[:-1]
            ],
            lambda x, r=rows[-1]: ((x - r) ** 2).sum(-1),
            initial_state=[0.0, 0.0],
        )
        for answer in both:
            torch.testing.assert_close(answer.cost[i], solve(own, "casadi").cost, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("solver", "options"), SOLVERS[1:])
def test_a_capture_that_changes_and_is_not_named_is_noticed(solver, options):
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass, data=(target,)), solver, steps=STEPS, **options)
    prepared.solve()
    mass.fill_(2.0)
    with pytest.raises(ProblemError, match=r"no longer what it was .* name that tensor in data="):
        prepared.solve()


def test_a_change_is_noticed_wherever_in_a_captured_tensor_it_is():
    table = torch.linspace(1.0, 2.0, STEPS, dtype=F64)
    stage = Stage(lambda k, x, u: x + u, lambda k, x, u: table[k] * (u**2).sum(-1), control_dim=1)
    problem = StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=STEPS)
    prepared = prepare(problem, kernel="lowered")
    prepared.solve()
    table[-1] = 7.0
    with pytest.raises(ProblemError, match=r"a tensor \(12,\) that its functions capture has changed"):
        prepared.solve()
    table[-1] = 2.0 + 1e-15
    prepared.solve()


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, STEPS) for name in FUNCTIONS), ("dynamics", [0.0, 0.3, 1.0]), ("path_constraint", [0.0, 0.3, 1.0])],
)
def test_a_number_that_changes_is_noticed_and_each_function_asked_once(name, steps):
    numbers, calls = dict.fromkeys(FUNCTIONS, 1.0), dict.fromkeys(FUNCTIONS, 0)

    def counted(name, value):
        calls[name] += 1
        return numbers[name] * value

    problem = OCP(
        lambda t, x, u: counted("dynamics", u - 0.1 * x),
        lambda t, x, u: counted("running_cost", (u**2).sum(-1)),
        lambda t, x: counted("terminal_cost", (x**2).sum(-1)),
        path_constraint=lambda t, x, u: counted("path_constraint", u - 3),
        terminal_constraint=lambda t, x: counted("terminal_constraint", x),
        initial_state=[1.0],
        control_dim=1,
        horizon=1.0,
    )
    if "constraint" not in name:
        problem = dataclasses.replace(problem, path_constraint=None, terminal_constraint=None)
    prepared = prepare(problem, steps=steps, kernel="lowered")
    state = prepared.problem.initial_state + 0.1
    guess = prepared.solve(state)
    calls.update(dict.fromkeys(FUNCTIONS, 0))
    prepared.solve(state, initial_guess=guess)
    if "constraint" not in name:
        assert calls["dynamics"] == calls["running_cost"] == calls["terminal_cost"] == 1
    numbers[name] = 1.5
    with pytest.raises(ProblemError, match="tensor or number that its functions capture has changed"):
        prepared.solve(state)


def test_a_history_is_made_when_it_is_looked_at(monkeypatch):
    made = []
    monkeypatch.setattr(History, "tables", lambda _, like: made.append(like) or {"cost": like})
    history = Tables(History(progress=False), torch.ones(2))
    assert not made
    assert list(history) == ["cost"]
    assert len(history) == 1
    assert history["cost"] is made[0]
    assert repr(history) == repr(dict(history))
    assert len(made) == 1


def test_the_torch_kernel_sees_every_change():
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass, data=()), steps=STEPS, kernel="torch")
    mass.fill_(2.0)
    start = torch.tensor([0.5, -0.2], dtype=F64)
    wanted = fresh(target, mass, start, "ddp", {"kernel": "torch"})
    torch.testing.assert_close(prepared.solve().cost, wanted.cost)


def test_a_guess_and_strictness_are_those_of_solve():
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass), steps=STEPS, max_iterations=1, kernel="torch")
    first = prepared.solve()
    assert not bool(first.converged)
    with pytest.raises(ConvergenceError, match="iteration limit"):
        prepared.solve(strict=True)
    assert float(prepared.solve(initial_guess=first).cost) < float(first.cost)


@pytest.mark.parametrize("start", [[1.0], [[1.0, 2.0]], [1.0, float("nan")], "here"])
def test_states_that_do_not_fit_are_refused(start):
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass), steps=STEPS, kernel="torch")
    with pytest.raises(ProblemError, match="initial_state"):
        prepared.solve(start)


def test_one_state_serves_a_batch():
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    prepared = prepare(pendulum(target, mass, (2,)), steps=STEPS, kernel="torch")
    cost = prepared.solve([0.1, 0.2]).cost
    assert cost.shape == (2,)
    torch.testing.assert_close(cost[0], cost[1])


def test_a_solver_of_ones_own_needs_no_prepare():
    class Own:
        def solve(self, problem, guess, *, progress=False):
            return DDP(kernel="torch").solve(problem, guess)

    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    assert bool(prepare(pendulum(target, mass), Own(), steps=STEPS).solve([0.1, 0.2]).converged)


def test_unknown_options_are_refused_at_once():
    target, mass = torch.tensor([0.3, 0.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    with pytest.raises(ProblemError, match="no option 'kernle'"):
        prepare(pendulum(target, mass), kernle="torch")


def test_programs_made_later_are_compared_at_the_old_points():
    """Rows that are not alike get a program each, some of them after the data have changed."""
    target, mass = torch.zeros(2, 2, dtype=F64), torch.tensor(1.0, dtype=F64)
    fixed = torch.tensor([1.0, 2.0], dtype=F64)  # captured, one a problem

    def cost(t, x, u):
        return fixed * ((x - target) ** 2).sum(-1) + mass * (u**2).sum(-1)

    problem = OCP(
        lambda t, x, u: u, cost, initial_state=torch.ones(2, 2), control_dim=2, horizon=1.0, data=(target, mass)
    )
    prepared = prepare(problem, "casadi", steps=4)
    mass.fill_(3.0)
    solution = prepared.solve()
    again = prepared.solve()
    wanted = solve(problem, "ddp", steps=4, kernel="torch")
    for answer in (solution, again):
        torch.testing.assert_close(answer.cost, wanted.cost, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("solver", "options"), [("indirect", {}), ("shooting", {})])
def test_solvers_one_by_one_build_once(solver, options, batch, monkeypatch):
    calls = []
    monkeypatch.setattr(problem_module, "lower", lambda *given, **named: calls.append(0) or lower(*given, **named))
    target = torch.tensor([0.3], dtype=F64)
    prepared = prepare(tracking(target, initial_state=torch.ones(*batch, 1)), solver, steps=4, **options)
    assert len(calls) == 3  # the step, the end, and what they call
    target.fill_(2.0)
    solution = prepared.solve(torch.full((1,), 3.0))
    prepared.solve()
    assert len(calls) == 3
    assert_close(solution.cost, torch.full(batch, math.tanh(1.0)), rtol=1e-2)


@pytest.mark.parametrize("solver", ["ddp", "casadi", "indirect", "shooting"])
def test_data_of_each_problem_with_every_solver(solver):
    target = torch.tensor([[0.0], [5.0]], dtype=F64)
    problem = tracking(target, initial_state=target + 1)
    prepared = prepare(problem, solver, steps=4)
    first = prepared.solve()
    target.add_(1.0)
    second = prepared.solve(problem.initial_state + 1)
    for solution in (first, second):
        assert_close(solution.cost, torch.full((2,), math.tanh(1.0)), rtol=2e-2)


@pytest.mark.parametrize("solver", ["ddp", "casadi", "indirect", "shooting"])
def test_data_of_all_with_as_many_entries_as_there_are_problems(solver):
    target = torch.tensor([0.0, 3.0], dtype=F64)
    start = torch.tensor([[1.0, 3.0], [0.0, 5.0]], dtype=F64)
    problem = tracking(target, initial_state=start, control_dim=2)
    prepared = prepare(problem, solver, steps=4)
    first = prepared.solve()
    target.add_(1.0)
    second = prepared.solve(start + 1)
    for solution in (first, second):
        # the cost is quadratic in the distance
        assert_close(solution.cost, math.tanh(1.0) * torch.tensor([1.0, 4.0]), rtol=2e-2)
    assert_close(second.cost, first.cost, rtol=1e-9)


@pytest.mark.parametrize("solver", ["indirect", "shooting"])
def test_what_is_refused_is_refused_when_prepared(solver):
    problem = pendulum(torch.zeros(2, dtype=F64), torch.ones((), dtype=F64), path_constraint=lambda t, x, u: x - 9)
    with pytest.raises(ProblemError, match=f"has path_constraint; solver '{solver}' .*: use solver='ddp' or 'casadi'"):
        prepare(problem, solver)


@pytest.mark.parametrize("solver", ["indirect", "shooting"])
def test_solvers_one_by_one_see_every_change(solver):
    target = torch.tensor([0.0], dtype=F64)
    prepared = prepare(tracking(target), solver, steps=4)
    first = prepared.solve()
    target.fill_(2.0)
    second = prepared.solve([3.0])
    assert float(second.cost) == pytest.approx(float(first.cost), rel=1e-9)
    assert float(second.states[-1]) == pytest.approx(2 + float(first.states[-1]), rel=1e-6)


@pytest.mark.parametrize("options", [{"compile": True}, {"compile": False}, {"kernel": "torch"}])
def test_threads_that_share_a_prepared_problem(options):
    """And no solution is overwritten by a later one."""
    prepared = prepare(swing(), steps=5, **options)
    starts = [[1.0 + 0.1 * i, 0.1 * i] for i in range(4)]
    alone = [prepared.solve(start) for start in starts]
    kept = [(one.states.clone(), one.gains.K.clone(), one.costates.clone()) for one in alone]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(prepared.solve, starts))
    for one, other, (states, gains, costates) in zip(alone, together, kept, strict=True):
        assert torch.equal(one.states, states)
        assert torch.equal(one.gains.K, gains)
        assert torch.equal(one.costates, costates)
        torch.testing.assert_close(other.states, states, rtol=1e-12, atol=1e-12)


def test_an_early_stop_calls_the_users_functions_no_more_than_an_answer():
    """A controller that takes one iteration at a time has no time for another rollout in torch."""
    counts = {}
    for limit in (1, 50):
        prepared, calls = prepare(swing(), steps=5, kernel="lowered", max_iterations=limit), []
        stage = prepared.problem.groups[0].stage
        joint = stage.joint
        object.__setattr__(stage, "joint", lambda *a, calls=calls, joint=joint: calls.append(1) or joint(*a))
        solution = prepared.solve([2.5, 0.0])
        assert bool(solution.converged) == (limit == 50)
        counts[limit] = len(calls)
    assert (
        "the iteration limit was reached; raise max_iterations"
        in prepare(swing(), steps=5, max_iterations=1).solve([2.5, 0.0]).status
    )
    assert counts[1] == counts[50] > 0
