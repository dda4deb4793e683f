"""Every optimiser of the registry trains; what does not exist is named."""

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.optim.registry import OPTIMIZERS, optimizer
from ocnopt.problems import learning_task


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_of_the_registry_trains(name):
    task = learning_task("wine").build()
    model, record = task.make_model(), optimizer(name)
    assert record.name == name
    assert record.label
    assert record.summary
    trained = record.build(model, record.lr / 10)
    inputs, targets = task.batch(0, size=32, seed=0)
    losses = []
    for _ in range(5):
        trained.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        trained.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert trained.param_groups[0]["lr"] == record.lr / 10


def test_an_unknown_optimiser():
    with pytest.raises(ProblemError, match="optimizer is 'rmsprob'; expected one of adam, .*; did you mean 'rmsprop'"):
        optimizer("rmsprob")


def test_plain_gradient_descent_has_no_momentum():
    parameter = torch.nn.Linear(1, 1)
    assert optimizer("sgd-plain").build(parameter, 0.1).param_groups[0]["momentum"] == 0
    assert optimizer("sgd").build(parameter, 0.1).param_groups[0]["momentum"] == 0.9
