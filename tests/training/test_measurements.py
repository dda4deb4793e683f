"""Studies that measure: closed forms, exact adjoints, bytes that grow or do not, and a kill that costs one seed."""

from dataclasses import replace
from math import exp

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from ocnopt.problems import LearningRecord, Task
from ocnopt.problems.learning.fields import Still
from ocnopt.runs import RunFolder
from ocnopt.training import Method, TrainConfig, Trainer, adjoint_errors, memory_depth
from ocnopt.training import regularity as regular
from ocnopt.training.adjoint_errors import Case, error
from ocnopt.training.measurement import Measurement, Sheet, middle, run_measurement
from ocnopt.training.regularity import PUBLISHED, regularity
from ocnopt.training.studies import MEASUREMENTS, STUDIES
from ocnopt.training.ways import BACKPROP, CONTINUOUS, DISCRETE, ODEINT, ODEINT_ADJOINT, by


def tiny() -> Task:
    inputs, targets = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10

    def make_model(horizon=1.0):
        return nn.Sequential(nn.Linear(4, 3), NeuralODE(Still([3, 4, 3]), horizon), nn.Linear(3, 10))

    return Task("digits_ode", inputs, targets, inputs, targets, make_model, cross_entropy, "")


@pytest.fixture(autouse=True)
def _tiny_task(monkeypatch):
    record = LearningRecord("digits_ode", "", tiny, "", batch_size=8, epochs=1, learning_rates={})
    for module in (adjoint_errors, memory_depth, regular):
        monkeypatch.setattr(module, "learning_task", lambda name: record)


@pytest.fixture
def case():
    torch.manual_seed(0)
    head, targets = nn.Linear(3, 5).double(), torch.arange(6) % 5
    x = torch.randn(6, 3, dtype=torch.float64)
    chosen_class = nn.functional.one_hot(targets, 5).double()
    return Case(Still([3, 4, 3]).double(), x, lambda end: -(head(end).log_softmax(-1) * chosen_class).sum(-1))


@pytest.mark.parametrize("horizon", [2.0, Horizon(0.5, 2.5), FreeHorizon(2.0, 0.2, 3.0)])
def test_regularity_of_a_linear_field(horizon):
    rates, start = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([[1.0, -2.0, 3.0]]).double()
    ode = NeuralODE(lambda t, x: -rates * x, horizon, rtol=1e-10, atol=1e-10)
    found = regularity(ode, start)
    # |F|^2 is a^2 x^2 exp(-2 a t), whose mean over a length of 2 is a x^2 (1 - exp(-4 a)) / 4
    energy = sum(a * x**2 * (1 - exp(-4 * a)) / 4 for a, x in zip(rates.tolist(), start[0].tolist(), strict=True)) / 3
    assert found.kinetic == pytest.approx(energy, rel=1e-8)
    assert found.jacobian == pytest.approx((0.25 + 1 + 4) / 3, rel=1e-12)  # a diagonal: the signs do not matter
    ode(start)
    assert found.evaluations == ode.statistics.forward


def test_the_jacobian_norm_is_that_of_frobenius_in_the_mean():
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = regularity(NeuralODE(lambda t, x: 0.1 * x @ matrix), torch.zeros(4000, 4, dtype=torch.float64))
    assert found.jacobian == pytest.approx(0.01 * float(matrix.square().sum()) / 4, rel=0.02)
    assert found.kinetic == 0.0


def test_a_field_that_does_not_see_the_state_has_no_jacobian():
    found = regularity(NeuralODE(lambda t, x: 3.0 * torch.ones_like(x)), torch.zeros(2, 4))
    assert (found.kinetic, found.jacobian) == (pytest.approx(9.0), 0.0)


def test_regularity_takes_one_tensor():
    ode, x = NeuralODE(lambda t, x: (-x[0], -x[1])), torch.ones(2, 3)
    with pytest.raises(ProblemError, match="x is a tuple; expected a state of one tensor, .*: join its parts"):
        regularity(ode, (x, x))


def test_every_way_finds_the_same_derivatives(case):
    tight = {"rtol": 1e-9, "atol": 1e-9}
    exact = by(BACKPROP, case.field, "dopri8", rtol=1e-11, atol=1e-11)
    for way in (ODEINT, ODEINT_ADJOINT, DISCRETE, CONTINUOUS):
        assert error(case.gradient(by(way, case.field, "dopri5", **tight)), case.gradient(exact)) < 1e-6
    truth = case.twice(exact)
    found = [
        case.twice(by(DISCRETE, case.field, "dopri5", **tight)),
        case.recursive(by(ODEINT_ADJOINT, case.field, "dopri5", **tight)),
        case.single(1e-9),
    ]
    assert [error(each, truth) < 1e-6 for each in found] == [True] * 3


def test_the_factors_are_means_over_samples_of_a_field_that_stands_still(case):
    for parameter in case.p[2:]:
        nn.init.zeros_(parameter)  # dx/dt = 0: inputs of the first layer stay x, costates stay those of the end
    A, _, _, last = case.factors(by(DISCRETE, case.field, "rk4", steps=3))
    inputs = torch.cat([case.x, torch.ones(6, 1)], 1)
    torch.testing.assert_close(A, inputs.mT @ inputs / 6)
    end = case.x.clone().requires_grad_()
    (costate,) = torch.autograd.grad(6 * case.loss(end), end)
    torch.testing.assert_close(last, costate.mT @ costate / 6)


def test_adjoints_are_measured(monkeypatch):
    monkeypatch.setattr(adjoint_errors, "METHODS", {"rk4": {"steps": 2}})
    lines = list(adjoint_errors.measure(0, True))
    assert all(line["to_solve"] < 1e-13 for line in lines if line["way"] == DISCRETE)
    other = [line for line in lines if line["way"] in (CONTINUOUS, ODEINT_ADJOINT, adjoint_errors.RECURSIVE)]
    assert all(1e-12 < line["to_solve"] < 1e-2 for line in other)
    assert all(line["to_flow"] < 1e-2 and line["ms"] > 0 for line in lines)


def test_memory_grows_by_back_propagation_and_not_by_the_continuous_adjoint():
    batch = tiny().batch(0, size=24, seed=0)

    def growth(way):
        first, last = (memory_depth._peak(tiny(), way, steps, batch, 0) for steps in (4, 16))
        return last / first

    assert growth(ODEINT) > 1.8
    assert growth(CONTINUOUS) == pytest.approx(1, abs=0.02)


def test_regularity_is_measured_at_the_start_and_after_each_epoch():
    lines = list(regular.measure(0, True))
    assert [(line["iteration"], line["method"]) for line in lines[:3]] == [
        (0, "Adam"),
        (0, "SNOpt"),
        (0, "SNOpt published"),
    ]
    assert len({(line["evaluations"], line["kinetic"], line["jacobian"]) for line in lines[:3]}) == 1  # one seed
    assert len({line["kinetic"] for line in lines[-3:]}) == 3
    assert lines[-1]["iteration"] == 2
    assert lines[0]["loss"] is None


def test_a_kill_costs_one_seed(tmp_path, monkeypatch):
    measured, fails = [], [True]

    def raise_interrupt(self, line):
        raise KeyboardInterrupt

    def measure(seed, quick):
        for row in ("a", "b"):
            measured.append((seed, row))
            if fails[0] and (seed, row) == (1, "b"):
                raise KeyboardInterrupt
            yield {"row": row, "value": 10.0 * seed}

    asked = Measurement("", "", "", measure, lambda lines: [Sheet("", (), ())], lambda lines: [], lambda lines: "")
    folder = RunFolder.create(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        run_measurement(asked, folder, seeds=3, quick=False)
    assert len(folder.metrics()) == 3
    with monkeypatch.context() as context:  # once more, before anything is written
        context.setattr(RunFolder, "log", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(asked, folder, seeds=3, quick=False)
    assert [line["row"] for line in folder.metrics()] == ["a", "b"]
    measured.clear()
    fails[0] = False
    lines = run_measurement(asked, folder, seeds=3, quick=False)
    assert measured == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert lines == folder.metrics() == run_measurement(asked, folder, seeds=3, quick=False)
    assert (middle(lines, "value", row="b"), middle(lines, "value", row="c")) == (10.0, None)


def test_options_of_the_optimiser():
    config = TrainConfig("digits_ode", "snopt", 0.1, batch_size=8, options={"refresh_every": 3, "curvature": "costate"})
    made = Trainer(tiny(), config).optimizer
    assert (made.refresh_every, made.curvature) == (3, "costate")
    with pytest.raises(
        ProblemError,
        match=r"the options power, lenght came for SNOpt \(.*'lenght'.*\); expected options of SNOpt .*: leave out",
    ):
        Trainer(tiny(), replace(config, options={"power": 1, "lenght": "noise"}))


def test_a_variant_of_a_method():
    assert (PUBLISHED.name, PUBLISHED.label) == ("snopt-published", "SNOpt published")
    assert PUBLISHED in STUDIES["optimizers"].methods
    own = Method("snopt", "adjoint", settings={"horizon_lr": 0.5})
    config = replace(STUDIES["integration-time"], methods=(own, PUBLISHED), problems=("digits",)).configs(
        "digits", 999, 0
    )
    assert config[0][1].horizon_lr == 0.5
    assert config[1][1].options["curvature"] == "costate"


def test_names_are_told_apart():
    assert not MEASUREMENTS.keys() & STUDIES.keys()
