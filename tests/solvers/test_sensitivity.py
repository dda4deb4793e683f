"""Gradients of solutions against finite differences of whole solves."""

import warnings

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import rollout
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.solution import load_solution
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP

F64 = torch.float64
STEPS, H = 7, 1e-4


def pendulum(data, start, **changes):
    """A pendulum with a constant push p among its unknowns; data are gravity, lever and weight of the goal."""

    def dynamics(t, x, u, p):
        force = u[..., 0] - data[..., 0] * torch.sin(x[..., 0]) + p[..., 0]
        return torch.stack([x[..., 1], force * data[..., 1]], dim=-1)

    def cost(t, x, u, p):
        return data[..., 2] * (x**2).sum(-1) + 0.1 * (u**2).sum(-1) + (p[..., 0] - 0.3) ** 2 + 1

    def miss(t, x, p):
        return 10 * data[..., 2] * (x**2).sum(-1)

    settings = {"horizon": 1.0, "control_dim": 1, "parameters": [0.1], "data": (data,)} | changes
    return OCP(dynamics, cost, miss, initial_state=start, **settings)


def numbers(*rows):
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=F64)


def random_loss(solution, seed=0):
    """A number that everything has a say in."""
    generator = torch.Generator().manual_seed(seed)
    parts = (solution.states, solution.controls, solution.parameters, solution.horizon, solution.cost, solution.times)
    return sum((v * torch.randn(v.shape, generator=generator, dtype=F64)).sum() for v in parts)


def gradients(prepared, start, data, loss):
    """By the backward pass, and by fourth-order differences of whole solves."""
    start = start.clone().requires_grad_()
    data.requires_grad_()
    solution = prepared.solve(start, differentiable=True)
    assert bool(solution.converged.all()), solution.status
    found = torch.autograd.grad(loss(solution), [start, data])
    data.requires_grad_(False)
    point = start.detach().clone()

    def value():
        with torch.no_grad():
            return float(loss(prepared.solve(point, initial_guess=solution)))

    wanted = []
    for tensor in (point, data):
        column = torch.zeros_like(tensor).reshape(-1)
        for i in range(tensor.numel()):
            for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                place = tensor.view(-1)
                kept = float(place[i])
                place[i] = kept + shift * H
                column[i] += weight * value() / (12 * H)
                place[i] = kept
        wanted.append(column.reshape(tensor.shape))
    return solution, found, wanted


def assert_close(found, wanted, rtol=1e-6):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


CASES = {
    "plain": {},
    "bounds": {"control_bounds": (-1.0, 0.4)},
    "free T": {"horizon": FreeHorizon(1.0, 0.2, 4.0), "control_bounds": (-1.0, 1.0)},
    "bounded p": {"parameter_bounds": (-0.2, 0.2), "horizon": FreeHorizon(1.0, 0.2, 1.2)},
}


@pytest.mark.parametrize("case", CASES)
def test_finite_differences_of_whole_solves(case):
    start, data = numbers([1.0, -0.5]), numbers([1.3, 0.8, 1.1])
    prepared = prepare(pendulum(data, start, **CASES[case]), steps=STEPS, tolerance=1e-11)
    solution, found, wanted = gradients(prepared, start, data, random_loss)
    at_bounds = {"bounds": (solution.controls == 0.4).sum() + (solution.controls == -1.0).sum() > 0}
    assert bool(at_bounds.get(case, True))
    assert_close(found, wanted)


def test_a_batch_with_data_of_each():
    start, data = numbers([1.0, -0.5], [0.3, 0.8]), numbers([1.3, 0.8, 1.1], [0.7, 1.2, 0.9])
    problem = pendulum(data, start, control_bounds=(-1.0, 0.4))
    prepared = prepare(problem, steps=STEPS, tolerance=1e-11)
    _, found, wanted = gradients(prepared, start, data, random_loss)
    assert_close(found, wanted)


def test_a_batch_with_shared_data_sums_their_gradients():
    start, data = numbers([[1.0, -0.5], [0.3, 0.8], [-0.6, 0.1]]), numbers([1.3, 0.8, 1.1]).requires_grad_()
    options = {"steps": STEPS, "kernel": "torch", "differentiable": True}
    together = solve(pendulum(data, start), **options)
    (found,) = torch.autograd.grad((together.states**2).sum() + together.controls[1].sum(), data)
    alone = [solve(pendulum(data, x), **options) for x in start]
    loss = sum((s.states**2).sum() for s in alone) + alone[1].controls.sum()
    (wanted,) = torch.autograd.grad(loss, data)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_the_cost_obeys_the_envelope_theorem():
    start, data = numbers([1.0, -0.5]).requires_grad_(), numbers([1.3, 0.8, 1.1]).requires_grad_()
    problem = pendulum(data, start, control_bounds=(-1.0, 0.4))
    solution = solve(problem, steps=STEPS, differentiable=True)
    found = torch.autograd.grad(solution.cost, [start, data])
    held = rollout(solution.problem, list(solution.controls.detach()), start, solution.parameters.detach())
    assert_close(found, torch.autograd.grad(held.cost, [start, data]))
    torch.testing.assert_close(found[0], solution.costates[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_both_solvers_have_the_same_gradients(shared):
    found = []
    for solver in ("ddp", "casadi"):
        start = numbers([[1.0, -0.5], [0.3, 0.8]]).requires_grad_()
        data = numbers([1.3, 0.8, 1.1]).requires_grad_()
        problem = pendulum(data, start, control_bounds=(-1.0, 0.4))
        solution = solve(problem, solver, steps=STEPS, differentiable=True, shared_parameters=shared)
        found.append(torch.autograd.grad(random_loss(solution), [start, data]))
    assert_close(*found)


def test_shared_parameters():
    start, data = numbers([[1.0, -0.5], [0.3, 0.8]]), numbers([1.3, 0.8, 1.1])
    problem = pendulum(data, start, control_bounds=(-1.0, 0.4), horizon=FreeHorizon(1.0, 0.2, 4.0))
    prepared = prepare(problem, steps=STEPS, tolerance=1e-11, shared_parameters=True)
    _, found, wanted = gradients(prepared, start, data, random_loss)
    assert_close(found, wanted)


def test_stages_of_several_sizes():
    weight = numbers([1.5]).requires_grad_()
    start = numbers([0.7, -0.4]).requires_grad_()
    stages = [
        Stage(lambda k, x, u: torch.sin(x) * weight + u, lambda k, x, u: (u**2).sum(-1), control_dim=2),
        Stage(
            lambda k, x, u: x[..., :1] * weight + u**3 + u, lambda k, x, u: weight[0] * (u**2).sum(-1), control_dim=1
        ),
    ]

    def made(w, x):
        return StagedOCP(stages, lambda x: weight[0] * ((x - 1) ** 2).sum(-1), initial_state=x, data=(weight,))

    def loss(solution):
        return solution.states[1].sum() + 2 * solution.states[2].sum() + solution.controls[0][0] + solution.cost

    solution = solve(made(weight, start), kernel="torch", tolerance=1e-11, differentiable=True)
    found = torch.autograd.grad(loss(solution), [weight, start])
    wanted = []
    for tensor in (weight, start):
        column = torch.zeros_like(tensor)
        for i in range(len(tensor)):
            for shift, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                with torch.no_grad():
                    tensor[i] += shift * H
                    moved = solve(made(weight, start.detach()), kernel="torch", tolerance=1e-11)
                    column[i] += factor * loss(moved) / (12 * H)
                    tensor[i] -= shift * H
        wanted.append(column.detach())
    assert_close(found, wanted)


def test_gradients_are_those_at_the_time_of_the_solve():
    start, data = numbers([1.0, -0.5]), numbers([1.3, 0.8, 1.1]).requires_grad_()
    prepared = prepare(pendulum(data, start), steps=STEPS, kernel="torch")
    solution = prepared.solve(differentiable=True)
    (wanted,) = torch.autograd.grad(solution.states.sum(), data, retain_graph=True)
    with torch.no_grad():
        data += 0.1
    (found,) = torch.autograd.grad(solution.states.sum(), data)
    torch.testing.assert_close(found, wanted)


def test_data_may_come_from_a_network():
    net = torch.nn.Linear(2, 3).double()
    data = 1 + 0.1 * net(numbers([0.5, 0.2]))
    solution = solve(pendulum(data, [1.0, -0.5]), steps=STEPS, differentiable=True)
    solution.states.sum().backward()
    assert all(bool(p.grad.any()) for p in net.parameters())


def test_a_problem_given_up_leaves_the_others_their_gradients():
    start = numbers([[1.0], [400.0], [0.5]]).requires_grad_()
    weight = numbers([1.5]).requires_grad_()

    def problem(x):
        def cost(t, x, u):
            return weight[0] * torch.exp(x[..., 0]) + (u**2).sum(-1)

        return OCP(lambda t, x, u: weight * x + u, cost, initial_state=x, control_dim=1, horizon=1.0, data=(weight,))

    with pytest.warns(UserWarning, match="1 of 3 problems did not converge"):
        solution = solve(problem(start), steps=5, kernel="torch", differentiable=True)
    fine = solution.converged
    assert fine.tolist() == [True, False, True]
    found = torch.autograd.grad(solution.states[fine].sum(), [start, weight], retain_graph=True)
    alone = start.detach()[fine].requires_grad_()
    solution_alone = solve(problem(alone), steps=5, kernel="torch", differentiable=True)
    wanted = torch.autograd.grad(solution_alone.states.sum(), [alone, weight])
    torch.testing.assert_close(found[0][fine], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    assert found[0][1].tolist() == [0.0]
    (lost,) = torch.autograd.grad(solution.states.sum(), weight)
    assert bool(lost.isnan())


def test_without_grad_mode_there_is_no_graph():
    data = numbers([1.3, 0.8, 1.1]).requires_grad_()
    with torch.no_grad():
        assert not solve(pendulum(data, [1.0, 0.0]), steps=5, differentiable=True).cost.requires_grad
    assert not solve(pendulum(data, [1.0, 0.0]), steps=5).states.requires_grad


def test_second_derivatives_are_refused():
    data = numbers([1.3, 0.8, 1.1]).requires_grad_()
    solution = solve(pendulum(data, [1.0, 0.0]), steps=5, kernel="torch", differentiable=True)
    with pytest.raises(ProblemError, match=r"first order only; expected a plain backward\(\)"):
        torch.autograd.grad(solution.cost, data, create_graph=True)


def test_what_did_not_converge_is_said():
    data = numbers([1.3, 0.8, 1.1]).requires_grad_()
    with pytest.warns(UserWarning, match="the solve did not converge: the gradients are those of a point that is no"):
        solve(pendulum(data, [1.0, 0.0]), steps=5, kernel="torch", max_iterations=1, differentiable=True)


def test_a_saddle_is_said():
    weight = numbers([1.0]).requires_grad_()

    def cost(t, x, u):
        return weight[0] * torch.cos(x[..., 0]) + 0.01 * (u**2).sum(-1)

    problem = OCP(lambda t, x, u: u, cost, initial_state=[0.0], control_dim=1, horizon=1.0, data=(weight,))
    guess = torch.zeros(5, 1, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve(problem, steps=5, kernel="torch", initial_guess=guess, differentiable=True)
    with pytest.warns(UserWarning, match="no strict minimum"):
        torch.autograd.grad(solution.states.sum(), weight)


def test_gradients_that_nobody_asks_for_are_refused():
    with pytest.raises(ProblemError, match="need no gradients; expected one that does"):
        solve(pendulum(numbers([1.3, 0.8, 1.1]), [1.0, 0.0]), steps=5, differentiable=True)


def test_the_gradient_of_an_augmented_lagrangian_is_that_of_ipopts_answer():
    gradients, target = [], numbers([0.3, 0.0])
    for solver, options in (("ddp", {"kernel": "torch"}), ("casadi", {})):
        data = numbers([1.3, 0.8, 1.1]).requires_grad_()
        problem = pendulum(data, [1.0, 0.0], terminal_constraint=lambda t, x, p: x - target)
        solution = solve(problem, solver, steps=8, differentiable=True, **options)
        (solution.cost + solution.controls.square().sum()).backward()
        gradients.append(data.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_collocation_has_no_gradients():
    data = numbers([1.3, 0.8, 1.1]).requires_grad_()
    with pytest.raises(ProblemError, match="solves another problem than the discrete"):
        solve(pendulum(data, [1.0, 0.0]), "casadi", steps=5, differentiable=True, method="collocation")


def test_an_answer_that_misses_the_dynamics_has_no_gradients():
    data = numbers([1.3, 0.8, 1.1]).requires_grad_()
    problem = pendulum(data, [1.0, 0.0])
    solver = DDP(kernel="torch")

    class Own:
        def solve(self, problem, guess, *, progress=False):
            result = solver.solve(problem, guess)
            return result._replace(states=result.states * 1.01)

    with pytest.raises(ProblemError, match="misses the discrete dynamics by"):
        solve(problem, Own(), steps=5, differentiable=True)


CONSTRAINTS = {
    "end": {"terminal_constraint": lambda data: lambda t, x, p: x[..., :1] - 0.2 * data[..., :1]},
    "path": {
        "path_constraint": lambda data: (
            lambda t, x, u, p: torch.stack([-0.9 - x[..., 1], u[..., 0] - 0.5 * data[..., 1]], dim=-1)
        )
    },
}
CONSTRAINTS["both, free T"] = CONSTRAINTS["end"] | CONSTRAINTS["path"]


@pytest.mark.parametrize("case", CONSTRAINTS)
def test_active_constraints_stay_active(case):
    start, data = numbers([1.0, -0.5]), numbers([1.3, 0.8, 1.1])
    changes = {name: make(data) for name, make in CONSTRAINTS[case].items()}
    horizon = FreeHorizon(1.0, 0.2, 3.0) if "free" in case else 1.0
    problem = pendulum(data, start, horizon=horizon, **changes)
    prepared = prepare(problem, "casadi", steps=STEPS, tolerance=1e-11)
    solution, found, wanted = gradients(prepared, start, data, random_loss)
    if "path" in changes:
        assert int((solution.controls > 0.4 - 1e-7).sum()) > 2
    assert_close(found, wanted)


def test_a_batch_with_constraints():
    start, data = numbers([[1.0, -0.5], [0.3, 0.8]]), numbers([1.3, 0.8, 1.1])
    changes = {name: make(data) for name, make in CONSTRAINTS["both, free T"].items()}
    data.requires_grad_()
    options = {"steps": STEPS, "differentiable": True}
    together = solve(pendulum(data, start, **changes), "casadi", **options)
    (found,) = torch.autograd.grad(together.states.square().sum(), data)
    alone = [solve(pendulum(data, x, **changes), "casadi", **options).states.square().sum() for x in start]
    (wanted,) = torch.autograd.grad(sum(alone), data)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_the_last_node_takes_no_constraint_of_states_and_controls():
    data = numbers([0.5]).requires_grad_()
    problem = OCP(
        lambda t, x, u: u,
        lambda t, x, u: ((x - 1) ** 2).sum(-1),
        lambda t, x: 10 * ((x - 1) ** 2).sum(-1),
        path_constraint=lambda t, x, u: x + 0.1 * u - data,
        initial_state=[0.0],
        control_dim=1,
        horizon=1.0,
        data=(data,),
    )
    solution = solve(problem, "casadi", steps=4, differentiable=True)
    with pytest.raises(ProblemError, match="states and controls together at the last node"):
        torch.autograd.grad(solution.states.sum(), data)


def test_an_implicit_integrator():
    """Along one line through all numbers: these solves take long."""
    start, data = numbers([1.0, -0.5]).requires_grad_(), numbers([1.3, 0.8, 1.1]).requires_grad_()
    lines = numbers([0.6, -0.8]), numbers([0.5, 1.0, -0.7])
    prepared = prepare(pendulum(data, start.detach()), steps=3, integrator="radau2", tolerance=1e-9)
    solution = prepared.solve(start, differentiable=True)
    found = torch.autograd.grad(random_loss(solution), [start, data])
    kept, wanted = data.detach().clone(), 0.0
    data.requires_grad_(False)
    for shift, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        data.copy_(kept + shift * H * lines[1])
        there = prepared.solve(start.detach() + shift * H * lines[0], initial_guess=solution)
        wanted += weight * float(random_loss(there)) / (12 * H)
    largest = max(float(slope.abs().max()) for slope in found)
    ours = sum(float((slope * line).sum()) for slope, line in zip(found, lines, strict=True))
    assert ours == pytest.approx(wanted, rel=1e-6, abs=1e-6 * largest)


def test_data_with_gradients_neither_warn_nor_reach_the_file(tmp_path):
    goal = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    problem = OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (u**2).sum(-1),
        initial_state=[0.0, 0.0],
        control_dim=1,
        horizon=2.0,
        terminal_constraint=lambda t, x: x - goal,
        data=(goal,),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(problem, steps=5, differentiable=True)
    solution.save(tmp_path / "one.pt")
    read = load_solution(tmp_path / "one.pt")
    assert solution.cost.requires_grad
    assert not read.cost.requires_grad
    assert not read.states.requires_grad
    torch.testing.assert_close(read.states, solution.states.detach(), rtol=0, atol=0)
