"""The measurements run; what they measure is no matter for a test."""

import pytest
import torch

from tests.benchmarks import (
    batch,
    cases,
    control,
    engines,
    gradients,
    iterations,
    layerwise,
    memory,
    mpc,
    mpc_pytorch,
    race,
    starts,
    versions,
    wide,
)


@pytest.mark.parametrize("name", iterations.NETS)
def test_iterations(name):
    found = iterations.measure(iterations.NETS[name], pairs=12)
    assert found.pairs == 6  # without the first ones
    assert found.ordinary > 0
    assert found.refresh > 0


def test_memory():
    assert min(memory.measure(iterations=1).values()) > 1_000_000


def test_wide():
    found = wide.measure(wide.NETS["digits, Neural ODE, field 64-512-64"], seed=0, iterations=wide.WINDOW)
    assert found.rate in wide.RATES
    assert min(*found.losses, *found.accuracies) > 0.0


def test_race(tmp_path):
    kept = race.Kept(tmp_path / "runs")
    found = race.race_all(race.WORKLOADS["mlp"], seeds=1, iterations=race.WINDOW, kept=kept)
    assert all(finish.evaluations > 0 for (finish,) in found.values())
    again = race.Kept(tmp_path / "runs")
    assert [race.keys() for race in again.races] == [race.keys() for race in kept.races]
    # goes on where it was interrupted: the times of a second run would be others
    assert race.race_all(race.WORKLOADS["mlp"], seeds=1, iterations=race.WINDOW, kept=again) == found


def test_a_race_that_was_interrupted_is_run_again_as_a_whole(tmp_path, monkeypatch):
    clock, ended = [0.0], []

    def start(data, size, seed, pair, iterations, course):
        def steps():
            for _ in range(iterations):
                clock[0] += 1.0  # of one process: another would begin anew, on another machine at another speed
                course.losses.append(1.0)
                course.seconds.append(clock[0])
                yield

        return None, steps()

    def metric(data, trainer):
        ended.append(trainer)
        if len(ended) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(race, "_start", start)
    monkeypatch.setattr(race, "_metric", metric)
    pairs, mlp = [("adam", 0.1), ("snopt", 0.1)], race.WORKLOADS["mlp"]
    with pytest.raises(KeyboardInterrupt):  # adam has ended, snopt has not
        race.race(mlp, 0, pairs, 2, race.Kept(tmp_path / "runs"))
    found = race.race(mlp, 0, pairs, 2, race.Kept(tmp_path / "runs"))
    assert [course.seconds for course in found.values()] == [[5.0, 7.0], [6.0, 8.0]]
    kept = race.Kept(tmp_path / "runs")
    assert race.race(mlp, 0, pairs, 2, kept) == found
    assert race.race(mlp, 0, pairs[1:], 2, kept) == {pairs[1]: found[pairs[1]]}
    others = [pairs[0], ("sgd", 0.1)]  # adam is there, from another race
    assert [course.seconds for course in race.race(mlp, 0, others, 2, kept).values()] == [[9.0, 11.0], [10.0, 12.0]]


def test_no_opponent_gets_more_than_its_share_of_time(monkeypatch):
    cost = {"adam": 1.0, "snopt": 2.0, "sgd": 4.0}

    def start(data, size, seed, pair, iterations, course):
        def steps():
            for k in range(iterations):
                course.losses.append(1.0)
                course.seconds.append(cost[pair[0]] * (k + 1))
                yield

        return None, steps()

    monkeypatch.setattr(race, "_start", start)
    monkeypatch.setattr(race, "_metric", lambda data, trainer: 0.0)
    courses = race.race(race.WORKLOADS["mlp"], 0, [(name, 0.1) for name in cost], 8, race.Kept())
    # of sgd the sixth iteration ends after 24 seconds, the first beyond two and a half times the 8 of adam
    assert [len(course.losses) for course in courses.values()] == [8, 8, 6]


def test_when_a_race_is_over():
    falling = [float(k) for k in range(20, 0, -1)]
    adam = race.Course(falling, [k + 1.0 for k in range(20)], [10] * 20, 0.5, lost=False)
    assert adam.end == 4.5
    quick = race.Course([2.0 * loss for loss in falling[10:]], [k / 2 for k in range(10)], [7] * 10, 0.9, lost=False)
    assert quick.first(adam.end) is None
    assert quick.first(11.0) == 9  # the mean of 16, 14, .., 4 is 10, of 20, 18, .., 6 it is 13
    ended = race.finish(("snopt", 0.1), quick, adam._replace(losses=[11.0] * 20))
    assert ended.ratio == 4.0 / 20.0
    assert ended.evaluations == 7
    lost = race.finish(("sgd", 1.0), race.Course([], [], [], float("nan"), lost=True), adam)
    assert lost.iterations is None
    assert lost.loss == float("inf")
    assert lost.evaluations == 0
    assert race.geometric_mean([0.5, 2.0]) == 1.0
    assert race.geometric_mean([0.5, None]) == float("inf")


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_engines(method):
    field, start = engines.workloads()["MLP"]
    found = {way.name: way for way in engines.measure(field, start, method, repeats=1)}
    assert found[engines.ADJOINT].over_adjoint == found[engines.BACKPROP].over_backprop == 1.0
    assert all(way.error < 0.02 for way in found.values())


def test_a_missed_limit_of_the_engine_is_named():
    ways = [
        engines.Engine(engines.BACKPROP, 1.0, 0.5, 2e-3, 10.0),
        engines.Engine(engines.DEFAULT, 0.41, 0.2, 2.1e-3, 4.1),
    ]
    assert engines.limits(ways, engines.Wanted(0.4, 0.2)) == ["<= 0.4, missed", "<= 0.2", "<= 0.002, missed"]
    assert engines.limits(ways, engines.Wanted(0.5)) == ["<= 0.5", "", "<= 0.002, missed"]


def test_control():
    found = control.measure("pendulum_swing_up", 20, control.BESIDE, repeats=1)
    assert (found[2] is None) is not control.peer.INSTALLED
    found = [entry for entry in found if entry is not None]
    assert {"compiled", "lowered", "IPOPT"} <= {entry.name for entry in found}
    assert min(entry.milliseconds for entry in found) > 0
    assert max(entry.difference for entry in found) < 1e-9


def test_mpc():
    found = mpc.measure(steps=2)
    assert all(step.milliseconds > 0 for step in found)
    assert max(step.difference for step in found) < 1e-7


def test_starts():
    ends = starts.measure("pendulum_swing_up_u5", 40, 3.0, starts=2)
    assert (ends.converged, ends.confirmed) == (2, 2), ends.wrong


def test_counts():
    found = iterations.count("pendulum_swing_up", 20)
    assert found.same
    assert min(found.sweeps, found.ipopt, *found.remedies.values()) > 0


def test_average():
    found = iterations.average("pendulum_swing_up_u5", 20, 1.0, around=False, starts=1)
    assert found.same == 1
    assert min(found) > 0


def test_batch():
    for found in batch.measure("pendulum_swing_up", batch=3, steps=20, rows=2):
        assert (found.converged, found.same) == (3, 2)
        assert found.gain > 0


def test_scaling():
    assert batch.scaling("pendulum_swing_up", small=2, large=3, steps=20, repeats=1).ratio > 0


def test_gradients():
    assert gradients.measure(2, repeats=1, steps=20).over_iteration > 0


def test_the_embedded_pendulum_is_the_same_problem():
    starts = torch.tensor([[3.0, 0.4], [-1.0, 2.0]], dtype=torch.float64)
    problem, dynamics = mpc_pytorch.pendulums(starts), mpc_pytorch.Embedded()
    x = torch.stack([starts[:, 0].cos(), starts[:, 0].sin(), starts[:, 1]], -1)
    u = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    angle, rate = problem.groups[0].stage.dynamics(torch.tensor(0), starts, u).unbind(-1)
    torch.testing.assert_close(dynamics(x, u), torch.stack([angle.cos(), angle.sin(), rate], -1))
    slopes = torch.func.vmap(torch.func.jacrev(lambda x, u: dynamics(x[None], u[None])[0], argnums=(0, 1)))(x, u)
    torch.testing.assert_close(dynamics.grad_input(x, u), slopes)


def test_crocoddyl_solves_its_unicycle():
    pytest.importorskip("crocoddyl")
    found = control.measure(control.UNICYCLE, 20, (control.COMPILED, *control.PEERS, control.IPOPT), repeats=1)
    assert max(entry.difference for entry in found) < 1e-9


def test_mpc_pytorch():
    pytest.importorskip("mpc.mpc")
    theirs, ours = mpc_pytorch.measure(2, (control.COMPILED,), max_iterations=2)
    assert (theirs.iterations, ours.name) == (2, "compiled")


def test_cases():
    assert cases.solve_quadrotors(batch=2, steps=5, max_iterations=2)[1] <= 4
    assert cases.solve_pendulum(steps=5)[1] > 0
    for adjoint in ("discrete", "continuous"):
        assert cases.backward_passes(adjoint, times=1)[0] > 0
    assert cases.products(times=1)[0] > 0


def test_versions():
    with versions.version(versions.HERE) as ask:
        cost = versions.measure("discrete", ask, lambda case: (1.0, 1), repeats=1)
    assert cost.work == cost.ratio_of_work == 10
    assert cost.ratio == pytest.approx(cost.milliseconds / 1e3)


def test_versions_refuses_a_folder_without_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no package"), versions.version(tmp_path):
        pass


def test_layerwise():
    name, net = next(iter(layerwise.nets().items()))
    found = {cost.way: cost for cost in layerwise.measure(name, net._replace(steps=1), repeats=1)}
    assert found["Adam"].time == found["Adam"].memory == 1.0
    assert found["OCNOpt"].memory > 1.0
