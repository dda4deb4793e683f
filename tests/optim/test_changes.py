"""What may change under the optimisers: precision, what is trained, autocast."""

import copy

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Model, backward, gathering, loss

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def model():
    torch.manual_seed(2)
    return Model()


@pytest.fixture
def x():
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_follows_a_model_to_another_precision(dtype, x):
    torch.manual_seed(2)
    model = Model().to(torch.float32 if dtype == torch.float64 else torch.float64)
    optimizer = gathering(model)
    for k in range(7):
        if k == 3:
            model.to(dtype)
        optimizer.zero_grad()
        loss(model, x.to(model.stem.weight.dtype)).backward()
        optimizer.step()
    assert {
        value.dtype
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.endswith("step") and key != "basis_since"
    } == {dtype}


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_part_set_free_on_the_way_is_preconditioned(part, model, x):
    getattr(model.head, part).requires_grad_(False)
    optimizer = gathering(model, 0.01, param_groups=[{"params": model.parameters()}])
    for k in range(4):
        if k == 1:
            getattr(model.head, part).requires_grad_(True)
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    assert optimizer.state[model.head.weight]["input_vectors"].shape[-2] == 4  # three inputs and the bias


def test_a_bias_frozen_on_the_way_leaves_its_weight_preconditioned(model, x):
    optimizer = gathering(model)
    for k in range(4):
        if k == 1:
            model.head.bias.requires_grad_(False)
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    assert optimizer.state[model.head.weight]["input_vectors"].shape[-2] == 3


def test_a_module_added_later_can_be_trained(model, x):
    optimizer = gathering(model)
    model.last = nn.Linear(2, 2)
    optimizer.add_param_group({"params": model.last.parameters()})
    model.last(model(x)).square().mean().backward()
    optimizer.step()
    assert "moments" in optimizer.state[model.last.weight]


def test_a_group_that_was_refused_is_not_kept(model):
    optimizer = gathering(model, 0.01, param_groups=[{"params": model.head.parameters()}])
    with pytest.raises(ProblemError, match="lr is -1.0"):
        optimizer.add_param_group({"params": model.stem.parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", ["feedback", "adjoint"])
def test_a_field_frozen_or_set_free_after_the_policy_was_made(rule, model, x):
    optimizer, policy = gathering(model), HorizonPolicy(model.ode, lr=0.1, rule=rule)
    state = optimizer.state_dict()
    for free in (False, True):
        model.ode.field.requires_grad_(free)
        optimizer.load_state_dict(state)
        before = model.ode.T.clone()
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
        policy.step()
        assert before != model.ode.T


def test_a_policy_stays_with_a_model_whose_parameters_are_exchanged(model, x):
    ends = []
    for assign in (False, True):
        each = copy.deepcopy(model)
        policy, saved = HorizonPolicy(each.ode, lr=0.01, penalty=0.1), copy.deepcopy(each.state_dict())
        each.load_state_dict(saved, assign=assign)
        for _ in range(2):
            loss(each, x).backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.1 * parameter.grad
            policy.step()
        ends.append(each.ode.T)
    assert torch.equal(*ends)
    assert ends[0] != model.ode.T


@pytest.mark.parametrize("place", ["backward", "step"])
def test_autocast_does_not_reach_the_factors(place):
    """Whatever a training loop puts inside of its autocast context."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2)).float()
    optimizer, x = gathering(model), torch.randn(5, 2, 4, dtype=torch.float32)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = model(x).square().mean()
            if place == "backward":
                value.backward()
        if place == "step":
            value.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=place == "step"):
            optimizer.step()
    assert all("moments" in optimizer.state[model[i].weight] for i in (0, 2))
    assert {
        value.dtype
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    } == {torch.float32}


def test_a_bias_that_comes_late_or_misses_a_gradient_shares_the_factor_of_its_weight():
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer = SNOpt(layer, 0.005)
    for i in range(9):
        layer.bias.requires_grad_(i > 3)
        backward(layer, x)
        if i == 6:
            layer.bias.grad = None
        optimizer.step()
        if i > 3 and i != 6:
            assert optimizer.factors["bias"] == optimizer.factors["weight"] != 1.0


def test_a_change_of_precision_keeps_the_factors():
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer = SNOpt(layer, 0.005)
    for _ in range(4):
        backward(layer, x)
        optimizer.step()
    kept = optimizer.factors
    layer.to(torch.float32)
    optimizer.adaptation = 0.0
    backward(layer, x.float())
    optimizer.step()
    assert optimizer.factors == kept
    assert len({*kept.values()}) == 1
    assert 1.0 not in kept.values()
