"""The training of a network as a control problem: the same loss and gradient, and solvers that lower it."""

import copy

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.paths import rollout
from ocnopt.problems.learning import network_control, plane
from ocnopt.solvers import solve
from tests.oracles.compare import assert_close


def case(step="free", layers=4, samples=6, **options):
    data = plane.build("spiral", samples=samples)
    return data.make_model(step=step, layers=layers, **options), data.train_inputs, data.train_targets


def loss_of(model, inputs, targets):
    return plane.half_squared_error(model(inputs), targets)


@pytest.mark.parametrize("tableau", ["euler", "kutta4"])
@pytest.mark.parametrize("field", ["standard", "gradient", "hamiltonian"])
@pytest.mark.parametrize("step", ["fixed", "free"])
def test_the_cost_is_the_loss_and_its_gradient_the_adjoint_s(tableau, field, step):
    model, inputs, targets = case(step, tableau=tableau, field=field, adjoint="discrete")
    problem = network_control.as_problem(model, inputs, targets)
    assert (problem.steps, problem.state_dim, problem.parameter_dim) == (4, 12, 3)
    controls = [u.clone().requires_grad_() for u in problem.initial_guess["controls"]]
    p = problem.parameters.clone().requires_grad_()
    cost = rollout(problem, controls, problem.initial_state, p).cost
    value = loss_of(model, inputs, targets)
    assert float(cost.detach()) == pytest.approx(float(value.detach()), rel=1e-13)
    *found, head = torch.autograd.grad(cost, [*controls, p])
    value.backward()
    net = model.net
    stacks = [net.weight.grad.flatten(1), net.bias.grad, *([net.sizes.grad[:, None]] if step == "free" else [])]
    assert_close(torch.stack(found), torch.cat(stacks, dim=1), rtol=1e-11, atol=1e-14)
    assert_close(head, torch.cat([model.head.weight.grad[0], model.head.bias.grad]), rtol=1e-11)


@pytest.mark.parametrize("step", ["fixed", "free"])
def test_ddp_trains_the_network(step):
    model, inputs, targets = case(step, samples=10)
    start, decay = copy.deepcopy(model), 1e-5
    problem = network_control.as_problem(model, inputs, targets, decay=decay)
    solution = solve(problem, "ddp", max_iterations=15)
    network_control.take_solution(model, solution)
    weights = [model.net.weight, model.net.bias, *([model.net.sizes] if step == "free" else [])]
    penalty = 0.5 * decay * sum(float(w.detach().square().sum()) for w in weights)
    assert float(loss_of(model, inputs, targets).detach()) + penalty == pytest.approx(float(solution.cost), rel=1e-10)
    assert float(loss_of(model, inputs, targets).detach()) < 0.5 * float(loss_of(start, inputs, targets).detach())


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-constr"])
def test_scipy_trains_the_network(method):
    model, inputs, targets = case(samples=10, adjoint="discrete")
    before = float(loss_of(model, inputs, targets).detach())
    found = network_control.minimise(model, inputs, targets, method=method, iterations=20)
    assert float(loss_of(model, inputs, targets).detach()) == pytest.approx(found.fun, rel=1e-12)
    assert found.fun < 0.5 * before
    assert found.nit <= 20


def test_a_simplex_ties_the_layers_together():
    model, inputs, targets = case("simplex")
    for train in (network_control.as_problem, network_control.minimise):
        with pytest.raises(ProblemError, match='step="simplex".*expected "fixed" or "free": train it by'):
            train(model, inputs, targets)
