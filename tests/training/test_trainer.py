"""The training loop: resumed runs are unbroken ones, bit for bit; runs leave each other alone; mistakes are named."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from ocnopt.errors import DataError, NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.problems import learning_task
from ocnopt.problems.learning.fields import Still
from ocnopt.runs import RunFolder
from ocnopt.training.trainer import TrainConfig, Trainer, advance, open_trainer, train

CONFIG = TrainConfig("digits", "adam", lr=3e-3, iterations=6, batch_size=16, checkpoint_every=2)
METHODS = [("adam", "fixed"), ("sgd", "adjoint"), ("snopt", "fixed"), ("snopt", "feedback")]


@pytest.fixture(scope="module")
def digits():
    return learning_task("digits").build()


def folder_of(path, config):
    return RunFolder.create(path, {"command": "train", "train": asdict(config)})


def without_time(metrics):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in metrics]


def assert_same_state(a, b):
    """Every tensor, number and string of two nested states, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_state(one, other)
    else:
        assert a == b


@pytest.mark.parametrize(("optimizer", "horizon"), METHODS)
def test_a_resumed_run_is_an_unbroken_run(tmp_path, digits, optimizer, horizon):
    config = replace(CONFIG, optimizer=optimizer, horizon=horizon, horizon_every=2)
    unbroken = folder_of(tmp_path / "unbroken", config)
    train([(Trainer(digits, config), unbroken)])

    broken = folder_of(tmp_path / "broken", config)
    trainer = Trainer(digits, config)
    for _ in range(5):  # the last checkpoint is of iteration 4: one iteration is lost
        advance(trainer, broken)
    del trainer
    torch.manual_seed(99)
    resumed, metrics = open_trainer(RunFolder.open(tmp_path / "broken"))
    assert resumed.iteration == len(metrics) == 4
    train([(resumed, broken)])

    assert without_time(broken.metrics()) == without_time(unbroken.metrics())
    assert_same_state(broken.load_checkpoint(), unbroken.load_checkpoint())


def test_a_run_without_a_checkpoint_starts_again(tmp_path, digits):
    folder = folder_of(tmp_path, CONFIG)
    advance(Trainer(digits, CONFIG), folder)
    resumed, metrics = open_trainer(folder)
    assert resumed.iteration == 0
    assert metrics == folder.metrics() == []


def test_runs_stepped_in_turn_are_runs_alone(digits):
    configs = [replace(CONFIG, seed=seed, optimizer=name) for seed, name in ((0, "adam"), (1, "sgd"))]
    alone = [[trainer.step()["loss"] for _ in range(3)] for trainer in (Trainer(digits, c) for c in configs)]
    pair = [Trainer(digits, config) for config in configs]
    in_turn = [[trainer.step()["loss"] for trainer in pair] for _ in range(3)]
    assert [list(losses) for losses in zip(*in_turn, strict=True)] == alone


def test_a_run_leaves_the_global_random_state_alone(digits):
    before = torch.get_rng_state()
    Trainer(digits, CONFIG).step()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_visits_no_sample_twice(digits):
    numbered = replace(digits, train_inputs=torch.arange(len(digits.train_targets)))
    count = numbered.batches(16)
    first, second = (
        torch.cat([numbered.batch(epoch * count + i, size=16, seed=0)[0] for i in range(count)]) for epoch in (0, 1)
    )
    assert len(first.unique()) == len(first) == 1437 // 16 * 16
    assert not torch.equal(first, second)


def test_the_lines_of_metrics(digits):
    trainer = Trainer(digits, replace(CONFIG, iterations=2))
    first, last = trainer.step(), trainer.step()
    assert trainer.finished
    assert first["iteration"] == 1
    assert first["epoch"] == 0
    assert first["T"] == 1.0
    assert first["forward"] > 0
    assert first["backward"] == 0  # every step's graph was kept
    assert "test_accuracy" not in first
    assert 0 <= last["test_accuracy"] <= 1
    assert last["seconds"] > first["seconds"] > 0


def test_a_policy_moves_the_horizon(digits):
    trainer = Trainer(digits, replace(CONFIG, horizon="feedback", horizon_every=1, horizon_lr=0.01))
    assert trainer.step()["T"] != trainer.step()["T"]


def test_every_neural_ode_of_a_model_has_a_policy(digits):
    def twice(horizon, **options):
        one, two = (digits.make_model(horizon, **options) for _ in range(2))
        one.ode = torch.nn.Sequential(one.ode, two.ode)
        return one

    trainer = Trainer(
        replace(digits, make_model=twice), replace(CONFIG, horizon="feedback", horizon_every=1, horizon_lr=0.01)
    )
    trainer.step()
    ends = [float(block.T) for block in trainer.model.ode]
    assert 1.0 not in ends
    assert ends[0] != ends[1]


def test_a_loss_that_is_not_finite(digits):
    trainer = Trainer(digits, CONFIG)
    with torch.no_grad():
        trainer.model.head.bias.fill_(torch.nan)
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at iteration 1; expected a finite number: lower the learning"
    ):
        trainer.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamm"}, "optimizer is 'adamm'; expected one of adam, sgd, .*snopt.*; did you mean 'adam'"),
        ({"horizon": "free"}, "horizon is 'free'; expected one of fixed, feedback, adjoint"),
        ({"iterations": 0}, "iterations is 0; expected a whole number of at least 1"),
        ({"lr": -1.0}, "lr is -1.0; expected a positive number"),
        ({"horizon_lr": float("nan")}, "horizon_lr is nan; expected a positive number"),
        ({"horizon_penalty": -0.1}, "horizon_penalty is -0.1; expected zero or a positive number"),
        ({"problem": "digit"}, "no problem is called 'digit'; did you mean 'digits'"),
        ({"problem": "scalar_lqr"}, "is a control problem"),
    ],
)
def test_mistakes_in_a_configuration(changes, message):
    with pytest.raises(ProblemError, match=message):
        TrainConfig(**{**asdict(CONFIG), **changes})


def test_a_batch_larger_than_the_data(digits):
    with pytest.raises(ProblemError, match="batch_size is 1438; expected at most the 1437 training samples"):
        Trainer(digits, replace(CONFIG, batch_size=1438))


def test_a_checkpoint_of_another_configuration(digits):
    state = Trainer(digits, CONFIG).state_dict()
    with pytest.raises(DataError, match="resume with the configuration that the run began with"):
        Trainer(digits, replace(CONFIG, seed=1)).load_state_dict(state)


def test_the_folder_of_another_command(tmp_path):
    with pytest.raises(DataError, match="was made by 'solve'; expected a folder of 'ocnopt train'"):
        open_trainer(RunFolder.create(tmp_path, {"command": "solve"}))


def test_evaluations_of_every_solve_are_counted(digits):
    """A model that calls its Neural ODE twice in an iteration has twice the evaluations of one call."""
    ode = NeuralODE(Still([64, 64]), method="rk4", steps=3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.ode, self.head = ode, nn.Linear(64, 10)

        def forward(self, images):
            return self.head(self.ode(self.ode(images.flatten(1))))

    trainer = Trainer(replace(digits, make_model=Twice), replace(CONFIG, iterations=2))
    assert [trainer.step()["forward"] for _ in range(2)] == [24, 24]
