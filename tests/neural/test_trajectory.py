"""The accepted steps of a solve: kept with their graphs, as states, or thinned, and pulled back."""

import pytest
import torch
from torch import nn

from ocnopt.differential.discrete import Costate, DiscreteStep, Replay, Replays, Taken, Trajectory
from ocnopt.differential.sweep import sweep
from ocnopt.integrate import fixed
from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.evaluation import Evaluation, Surroundings
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.state_layout import StateLayout
from tests.neural.cases import Plain, Tanh, distance, start

METHODS = sorted(TABLEAUS.keys() - {"adaptive_heun", "tsit5"})


def walked(name, budget, n=21, outputs=1, graphs=True):
    torch.manual_seed(0)
    field, x = Tanh(), start(2, 3)
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, x.device))
    evaluation.note_attributes()
    with torch.no_grad():
        root = evaluation.root(0.0, x.requires_grad_(), joins=graphs)
        trajectory = Trajectory(TABLEAUS[name], evaluation, budget, root.nbytes)
    with torch.set_grad_enabled(graphs):
        walk = fixed.integrate(
            evaluation,
            root.x,
            [i / outputs for i in range(outputs + 1)],
            step_size=1 / n,
            tableau=TABLEAUS[name],
            first=root.slope,
            on_step=trajectory.append,
            take=trajectory.take,
        )
    states = trajectory.release()
    return Replays(trajectory, states, walk.state.detach()), states, trajectory


def pulled(name, path, trajectory, jumps):
    back = DiscreteStep(TABLEAUS[name], trajectory.field, jumps)
    with torch.no_grad():
        value, _ = sweep(back, path, Costate(torch.zeros(2, 3).double(), [None] * 4, torch.zeros(0)))
    return torch.cat([value.x.flatten(), *(total.flatten() for total in value.parameters)])


@pytest.mark.parametrize("name", METHODS)
def test_states_and_thinned_states_are_the_same_steps(name):
    jumps = {1: start(2, 3), 2: start(2, 3), 3: start(2, 3)}
    path, _, trajectory = walked(name, 2**23, outputs=3, graphs=False)
    steps, expected = [*path], pulled(name, path, trajectory, jumps)
    assert len(steps) == 21
    for budget in (0, 100, 500):
        path, _, trajectory = walked(name, budget, outputs=3, graphs=False)
        assert torch.equal(pulled(name, path, trajectory, jumps), expected)
        for one, other in zip(steps, path, strict=True):
            assert one.step == other.step
            assert torch.equal(one.start, other.start)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 2.0])
def test_a_graph_and_replays_are_one_path(name, share):
    """Wherever the graph ends: at an output, between two, at the end."""
    field, x, times = Tanh(), start(2, 3).requires_grad_(), [0.0, 0.3, 0.5, 1.0]
    stages = len(TABLEAUS[name].c) - TABLEAUS[name].first_same_as_last
    weights = start(4, 2, 3)
    found = []
    for adjoint, budget in (("backprop", 0), ("discrete", int(share * 8 / 7 * 21 * stages * EVALUATION))):
        ode = NeuralODE(field, method=name, steps=20, adjoint=adjoint, checkpoint_bytes=budget)
        y = ode(x, times)
        found.append((y.detach(), torch.autograd.grad((weights * y).sum(), [x, *field.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    one, other = (torch.cat([part.flatten() for part in parts]) for _, parts in found)
    assert distance(one, other) < 1e-13
    assert (ode.statistics.backward == 0) == (share > 1)
    assert ode.statistics.backward <= (1 - share) * 21 * 2 * stages + 2 * stages or share > 1


# Of one evaluation of the field: the input of the first layer (2, 4) and the activations (2, 6), and its nodes: two of
# each layer, one of tanh and of cat, four parameters, the start.
EVALUATION = (2 * 4 + 2 * 6) * 8 + 11 * 1024


def test_what_one_evaluation_keeps():
    field, x = Tanh(), start(2, 3).requires_grad_()
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, x.device))
    assert evaluation.root(0.0, x, joins=True).nbytes == EVALUATION


def test_a_view_keeps_the_whole_that_it_is_a_part_of():
    field = Plain(lambda t, x: wide(x)[:, :3].square())
    field.wide = wide = nn.Linear(3, 4000).double()
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, torch.device("cpu")))
    with torch.no_grad():
        assert 5 * 4000 * 8 < evaluation.root(0.0, start(5, 3), joins=True).nbytes < 6 * 4000 * 8


def test_a_graph_fills_seven_eighths_and_states_the_rest():
    state, n, graph = 2 * 3 * 8, 21, 4 * EVALUATION
    for budget in (0, 1000, graph, 2 * graph, 10 * graph, 30 * graph):
        path, states, trajectory = walked("rk4", budget, n)
        kept = min(n, int(7 / 8 * budget) // graph)
        count, room = len([*path]), budget - kept * graph
        assert count == n - kept
        assert (trajectory.end is not None) == (kept > 0)
        # Where they do not fit, about the square root of their number.
        assert len(states) == count if count * state <= room else len(states) <= max(6, room // state)


def test_a_graph_can_be_pulled_twice():
    field, x = Tanh(), start(2, 3)
    for budget in (2**23, 8 * EVALUATION, 0):
        y = NeuralODE(field, method="dopri5", steps=3, checkpoint_bytes=budget)(x)
        one, other = (torch.autograd.grad(y.sum(), [*field.parameters()], retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri5"])
def test_moving_the_ends_of_a_step(name):
    _, _, trajectory = walked(name, 0, n=1, graphs=False)
    evaluation, times = trajectory.field, (0.4, 1.0)
    with torch.no_grad():
        x, costate = start(2, 3), start(2, 3)

        def end(first, last):
            times, tableau = (0.4 + first, 1.0 + last), TABLEAUS[name]
            return fixed.integrate(evaluation, x, times, step_size=1.0, tableau=tableau).state

        replay = Replay(Taken(0.4, 0.6, trajectory.steps[0].notes, 1), x)
        value = Costate(torch.zeros(2, 3).double(), [None] * 4, torch.zeros(2).double())
        value, _ = DiscreteStep(TABLEAUS[name], evaluation, {1: costate}, times=times)(replay, value)
        eps = 1e-6
        for actual, plus, minus in (
            (value.times[0], end(eps, 0.0), end(-eps, 0.0)),
            (value.times[1], end(0.0, eps), end(0.0, -eps)),
        ):
            expected = ((plus - minus) * costate).sum() / (2 * eps)
            assert distance(actual, expected) < 1e-7
