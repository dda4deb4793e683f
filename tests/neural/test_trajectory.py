"""The accepted steps of a solve: kept with their graphs, as states, or thinned, and pulled back."""

import pytest
import torch

from ocnopt.differential.discrete import Costate, DiscreteStep, Gradient, Kept, Path, StepPull, Trajectory
from ocnopt.differential.sweep import sweep
from ocnopt.integrate import fixed
from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.evaluation import Evaluation, StateLayout, Surroundings
from tests.neural.cases import Tanh, distance, start


def walked(name, budget, n=21, outputs=1, graphs=True):
    torch.manual_seed(0)
    field, x = Tanh(), start(2, 3)
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, x.device))
    with torch.no_grad():
        root = evaluation.root(0.0, x)
        trajectory = Trajectory(TABLEAUS[name], evaluation, budget, root.nbytes if graphs else None)
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
    tensors = trajectory.release()
    return Path(trajectory, tensors, walk.state.detach()), tensors, evaluation


def pulled(name, path, evaluation, jumps=()):
    back = DiscreteStep(StepPull(TABLEAUS[name], evaluation), dict(jumps))
    terminal = Costate(torch.ones(2, 3, dtype=torch.float64), Gradient(len(evaluation.parameters)), torch.zeros(0))
    with torch.no_grad():
        value, _ = sweep(back, path, terminal)
    return torch.cat([value.x.flatten(), *(total.flatten() for total in value.parameters.totals)])


def replays(path):
    with torch.no_grad():
        return [link for link in path if not isinstance(link, Kept)]


@pytest.mark.parametrize("name", sorted(TABLEAUS))
def test_a_graph_states_and_thinned_states_are_the_same_steps(name):
    jumps = {1: start(2, 3), 2: start(2, 3)}
    whole, _, evaluation = walked(name, 2**23, outputs=3)
    assert [type(link) for link in whole] == [Kept]
    expected = pulled(name, whole, evaluation, jumps)
    states, _, evaluation = walked(name, 2**23, outputs=3, graphs=False)
    assert distance(pulled(name, states, evaluation, jumps), expected) < 1e-14
    steps = replays(states)
    assert len(steps) == 21
    for budget in (0, 100, 100_000, 500_000):
        path, _, evaluation = walked(name, budget, outputs=3)
        assert distance(pulled(name, path, evaluation, jumps), expected) < 1e-14
        for one, other in zip(reversed(steps), reversed(replays(path)), strict=False):
            assert one.step == other.step
            assert torch.equal(one.start, other.start)


# Of one evaluation of the field: the input of the first layer (2, 4) and the activations (2, 6), and its nodes: two of
# each layer, one of tanh and of cat, four parameters, the start.
EVALUATION = (2 * 4 + 2 * 6) * 8 + 11 * 1024


def test_what_one_evaluation_keeps():
    field, x = Tanh(), start(2, 3)
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, x.device))
    assert evaluation.root(0.0, x).nbytes == EVALUATION


def test_a_graph_fills_seven_eighths_and_states_the_rest():
    state, n, graph = 2 * 3 * 8, 21, 4 * EVALUATION
    for budget in (0, 1000, graph, 2 * graph, 10 * graph, 30 * graph):
        path, tensors, _ = walked("rk4", budget, n)
        kept = min(n, int(7 / 8 * budget) // graph)
        count, room = len(replays(path)), budget - kept * graph
        assert count == n - kept
        states = [tensor for tensor in tensors if not tensor.requires_grad]
        # Where they do not fit, about the square root of their number.
        assert len(states) == count if count * state <= room else len(states) <= max(6, room // state)


def test_a_graph_can_be_pulled_twice():
    path, _, evaluation = walked("dopri5", 2**23, n=3)
    assert torch.equal(pulled("dopri5", path, evaluation), pulled("dopri5", path, evaluation))
    assert evaluation.statistics.forward == 1 + 3 * 6


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri5"])
def test_moving_and_growing_a_step(name):
    path, _, evaluation = walked(name, 0, n=3)
    with torch.no_grad():
        replay = [*path][1]
        costate = start(2, 3)
        found = StepPull(TABLEAUS[name], evaluation, moving=True)(replay, costate, Gradient(4))
        eps, h, t = 1e-6, replay.step.size, replay.step.time

        def end(shift, stretch):
            return fixed.integrate(
                evaluation,
                replay.start,
                (t + shift, t + shift + h * stretch),
                step_size=1.0,
                tableau=TABLEAUS[name],
            ).state

        for actual, plus, minus in (
            (found.stretch, end(0.0, 1 + eps), end(0.0, 1 - eps)),
            (found.shift, end(eps, 1.0), end(-eps, 1.0)),
        ):
            expected = ((plus - minus) * costate).sum() / (2 * eps)
            assert distance(actual, expected) < 1e-7
