"""The measurements run; what they measure is no matter for a test."""

from tests.benchmarks import control, engines, iterations, memory, race


def test_iterations():
    found = iterations.measure(pairs=2)
    assert found.ordinary > 0
    assert found.refresh > 0


def test_memory():
    assert min(memory.measure().values()) > 1_000_000


def test_race():
    end = race.race(seed=0, iterations=2, every=1)
    assert end.adam_first <= 2
    assert end.evaluations > 0


def test_engines():
    field, start = engines.workloads()["MLP"]
    found = engines.measure(field, start, repeats=1)
    assert found[0].ratio == 1.0
    assert all(way.error < 0.02 for way in found)


def test_control():
    ddp, casadi = control.measure(steps=20, repeats=1)
    assert (ddp.solver, casadi.solver) == ("ddp", "casadi")
