"""The accepted steps of a solve: kept with their graphs, as states, or thinned, and pulled back."""

import pytest
import torch

from ocnopt.differential.discrete import Gradient, Path, StepPull, Trajectory
from ocnopt.integrate import fixed
from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.evaluation import Evaluation, StateLayout, Surroundings
from tests.neural.cases import Tanh, distance, start


def walked(name, budget, n=21, graphs=True):
    torch.manual_seed(0)
    field, x = Tanh(), start(2, 3)
    evaluation = Evaluation(field, StateLayout(), [*field.parameters()], Surroundings(field, x.device))
    tableau, trajectory = TABLEAUS[name], Trajectory(TABLEAUS[name], evaluation, budget, graphs)
    with torch.no_grad():
        leaf, first = evaluation.root(0.0, x)
        walk = fixed.integrate(
            evaluation,
            leaf,
            (0.0, 1.0),
            step_size=1 / n,
            tableau=tableau,
            first=first,
            on_step=trajectory.append,
            take=trajectory.take,
        )
    tensors = trajectory.release()
    return Path(trajectory, tensors, walk.state.detach()), tensors, evaluation


def pulled(name, path, evaluation):
    pull, gradient = StepPull(TABLEAUS[name], evaluation), Gradient(len(evaluation.parameters))
    costate = torch.ones(2, 3, dtype=torch.float64)
    with torch.no_grad():
        for replay in reversed(path):
            costate = pull(replay, costate, gradient).x
    return torch.cat([costate.flatten(), *(total.flatten() for total in gradient.totals)])


@pytest.mark.parametrize("name", sorted(TABLEAUS))
def test_graphs_states_and_thinned_states_are_the_same_steps(name):
    whole, _, evaluation = walked(name, 2**20)
    assert all(replay.end is not None for replay in whole)
    expected = pulled(name, whole, evaluation)
    for budget in (0, 100, 2000, 20_000):
        path, _, evaluation = walked(name, budget)
        assert torch.equal(pulled(name, path, evaluation), expected)
        with torch.no_grad():
            for one, other in zip(whole, path, strict=True):
                assert one.step == other.step
                assert torch.equal(one.start, other.start)


def test_graphs_fill_what_the_states_leave():
    state, n = 2 * 3 * 8, 21
    for budget in (0, n * state, n * state + 5000, n * state + 20_000):
        path, tensors, _ = walked("rk4", budget, n)
        ends = [tensor for tensor in tensors if tensor.grad_fn is not None]
        assert len(tensors) - len(ends) == (n if budget else 6)  # every fourth
        with torch.no_grad():
            # The first steps keep their graphs; all others would have to be taken again.
            assert [replay.end is not None for replay in path] == [i < len(ends) for i in range(n)]
        assert len(ends) == max(0, min(n, (budget - n * state) // graph_bytes()))


def graph_bytes():
    # Of each of four evaluations: the input of the first layer (2, 4) and the activations (2, 6).
    return 4 * (2 * 4 + 2 * 6) * 8


def test_a_kept_graph_can_be_pulled_twice():
    path, _, evaluation = walked("dopri5", 2**20, n=3)
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
