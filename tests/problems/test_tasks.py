"""Every learning problem by name: what a training loop finds in it; tables, networks, metrics."""

import builtins

import numpy as np
import pytest
import torch

from ocnopt.errors import DataError
from ocnopt.problems import learning_task, names
from ocnopt.problems.learning import tables
from ocnopt.problems.learning.networks import Inception, Residual, mlp


@pytest.mark.parametrize("name", names("learning"))
def test_a_learning_problem_is_complete(name):
    record = learning_task(name)
    try:
        task = record.build()
    except DataError as error:
        if "is missing; expected it as" in str(error):
            pytest.skip(str(error))
        raise
    assert task.name == record.name == name
    assert record.summary
    assert record.source
    assert task.split
    assert task.batches(record.batch_size) >= 1
    model = task.make_model()
    inputs, targets = task.batch(0, size=record.batch_size, seed=0)
    assert len(inputs) == len(targets) == record.batch_size
    task.loss(model(inputs), targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    measured = task.evaluate(model)
    assert measured.keys() == {f"test_{metric}" for metric in task.metrics}
    assert model.training


def test_a_metric_is_the_mean_over_the_test_part():
    task = learning_task("digits_mlp").build()
    model = task.make_model()
    right = (model(task.test_inputs).argmax(1) == task.test_targets).sum().item()
    assert task.evaluate(model) == {"test_accuracy": right / 360}


@pytest.mark.parametrize(("name", "train", "columns", "classes"), [("breast_cancer", 426, 30, 2), ("wine", 133, 13, 3)])
def test_a_table(name, train, columns, classes):
    task = tables.build(name)
    assert task.train_inputs.shape == (train, columns)
    assert task.train_inputs.dtype == torch.float32
    assert task.train_inputs.mean(0).abs().max() < 1e-5
    assert (task.train_inputs.std(0) - 1).abs().max() < 1e-5
    together = torch.cat([task.train_targets, task.test_targets])
    share = torch.bincount(together) * len(task.test_targets) / len(together)
    assert len(share) == classes
    assert (torch.bincount(task.test_targets) - share).abs().max() <= 1
    assert task.make_model()(task.test_inputs).shape == (len(task.test_targets), classes)
    assert not torch.equal(tables.build(name, seed=1).test_targets, task.test_targets)


def test_a_table_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def no_sklearn(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(DataError, match=r"wine needs scikit-learn.*pip install 'ocnopt\[data\]'"):
        tables.build("wine")


def test_a_table_of_another_size(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.load_wine", lambda return_X_y: (np.zeros((5, 13)), np.zeros(5)))
    with pytest.raises(DataError, match=r"wine has shape \(5, 13\); expected \(178, 13\): install scikit-learn again"):
        tables.build("wine")


def test_networks(float64):
    x = torch.randn(2, 3, 8, 8)
    block = Residual(3, 3)
    branch = block.second(block.first(x).relu())
    assert torch.equal(block(x), (x + branch).relu())
    assert Residual(3, 5)(x).shape == (2, 5, 8, 8)
    joined = Inception(3, 2)
    assert torch.equal(joined(x)[:, 2:4], joined.middle(x).relu())
    assert joined(x).shape == (2, 6, 8, 8)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in mlp(4, 2, layers=15)) == 15
