"""Every optimiser of the registry trains; what does not exist or does not fit is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import ocnopt as oc
from ocnopt.errors import ProblemError
from ocnopt.optim.backtracking import descend
from ocnopt.optim.muon import Muon
from ocnopt.optim.registry import LARGEST, OPTIMIZERS, optimizer
from ocnopt.problems import learning_task
from ocnopt.problems.learning.networks import PlaneClassifier
from ocnopt.training import TrainConfig, Trainer

SMALL = TrainConfig("wine", "adam", lr=0.01, iterations=5, batch_size=133)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_of_the_registry_trains(name):
    record = optimizer(name)
    assert record.name == name
    assert record.label
    assert record.summary
    problem = "donut1d" if name == "itoh-abe" else "wine"  # 93 numbers to move, one by one
    task = learning_task(problem).build()
    asked = replace(SMALL, problem=problem, optimizer=name, lr=record.lr / 4, batch_size=len(task.train_targets))
    trainer = Trainer(task, asked)
    losses = [trainer.step()["loss"] for _ in range(2 if name == "itoh-abe" else SMALL.iterations)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adam", "snopt", "conformal", "itoh-abe", "riemannian"])
def test_the_rate_arrives(name):
    assert optimizer(name).build(nn.Linear(2, 2), 0.07).param_groups[0]["lr"] == 0.07


def test_structured_methods_are_what_they_say():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    build = lambda name: optimizer(name).build(net, 0.25)  # noqa: E731
    assert build("conformal").param_groups[0]["nesterov"] is False
    assert build("nesterov").param_groups[0]["nesterov"] is True
    assert isinstance(build("relativistic"), oc.optim.Relativistic)
    assert build("msa").param_groups[0]["rho"] == 4.0


@pytest.mark.parametrize("name", ["riemannian", "mec"])
def test_square_weights_become_orthogonal_and_stay_so(name):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    head = net[2].weight.detach().clone()
    trained = optimizer(name).build(net, 0.1)
    assert [len(group["params"]) for group in trained.param_groups] == [1, 3]
    assert torch.equal(net[2].weight, head)
    for _ in range(20):
        trained.zero_grad()
        net(torch.eye(3).double()).square().sum().backward()
        trained.step()
    weight = net[0].weight.detach()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(3).double(), rtol=0, atol=1e-12)
    assert not torch.equal(net[2].weight, head)


def test_backtracking_on_step_sizes_scales_as_descend_does():
    torch.manual_seed(0)
    nets, x = [PlaneClassifier(4, step="free", horizon=2.0).double() for _ in range(2)], torch.randn(9, 2).double()
    nets[1].load_state_dict(nets[0].state_dict())
    trained = optimizer("backtracking").build(nets[0], 1.0)
    losses = [float(trained.step(lambda: nets[0](x).square().mean())) for _ in range(6)]
    scales = [0.25 if name == "net.sizes" else 1.0 for name, _ in nets[1].named_parameters()]
    expected = descend(nets[1].parameters(), lambda: nets[1](x).square().mean(), 6, scales=scales)
    assert losses == pytest.approx(expected.losses[:-1], rel=1e-12)
    assert trained.param_groups[0]["lr"] == pytest.approx(expected.step, rel=1e-12)


def test_a_model_that_does_not_fit():
    with pytest.raises(ProblemError, match=rf"itoh-abe met 10100 trained numbers in Linear.*at most {LARGEST}: take"):
        optimizer("itoh-abe").build(nn.Linear(100, 100), 1.0)
    for name in ("riemannian", "mec"):
        with pytest.raises(
            ProblemError, match="met a PlaneClassifier without a linear layer of as many outputs as inputs; .*: take a"
        ):
            optimizer(name).build(PlaneClassifier(), 0.1)
    with pytest.raises(ProblemError, match=r"chain is PlaneClassifier; expected an nn.Sequential, whose children"):
        optimizer("msa").build(PlaneClassifier(), 0.1)


def test_an_unknown_optimiser():
    with pytest.raises(ProblemError, match="optimizer is 'rmsprob'; expected one of adam, .*; did you mean 'rmsprop'"):
        optimizer("rmsprob")


def test_an_optimiser_whose_package_is_missing(monkeypatch):
    here = {name: record for name, record in OPTIMIZERS.items() if name != "soap"}
    monkeypatch.setattr("ocnopt.optim.registry.OPTIMIZERS", here)
    with pytest.raises(
        ProblemError,
        match=r"is 'soap', whose package pytorch_optimizer is not .*; expected .*install 'ocnopt\[peers\]'",
    ):
        optimizer("soap")


def test_muon_has_one_group():
    groups = [{"params": layer.parameters(), "lr": 0.1} for layer in (nn.Linear(2, 2), nn.Linear(2, 2))]
    refused = pytest.raises(ProblemError, match="Muon met a second group of parameters; expected one, .*: give all")
    with refused:
        Muon(groups)
    single = Muon(groups[:1])
    with refused:
        single.add_param_group(groups[1])
    assert len(single.param_groups) == 1


def test_plain_gradient_descent_has_no_momentum():
    parameter = torch.nn.Linear(1, 1)
    assert optimizer("sgd-plain").build(parameter, 0.1).param_groups[0]["momentum"] == 0
    assert optimizer("sgd").build(parameter, 0.1).param_groups[0]["momentum"] == 0.9
