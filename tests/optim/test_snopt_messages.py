"""What SNOpt refuses, and that it leaves everything as it was."""

import copy
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Net, backward

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    optimizer = SNOpt(model, 0.01)
    for _ in range(2):
        backward(model, x)
        optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    backward(model, x)
    model[2].weight.grad[0, 1] = value
    with pytest.raises(
        NonFiniteError, match=r"gradients of '2.weight' hold NaN or infinity at step 2; expected finite"
    ):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(*map(torch.as_tensor, (part, state["state"][key][name]))) for name, part in entry.items()
        )
    backward(model, x)
    optimizer.step()


def test_a_skipped_batch_with_nan_does_not_reach_the_factors():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = SNOpt(model, 0.01)
    backward(model, x * torch.nan)
    with pytest.raises(NonFiniteError):
        optimizer.step()
    backward(model, x * torch.nan)  # and one whose step was left out
    backward(model, x)
    optimizer.step()
    assert optimizer.state[model.weight]["moments"].isfinite().all()


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    with pytest.warns(UserWarning, match="first-order"):
        optimizer = SNOpt(model, 0.01)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ProblemError, match=r"gradients of 'weight' are sparse; expected dense ones"):
        optimizer.step()


def test_a_step_without_gradients_does_nothing():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    SNOpt(layer, 0.01).step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr is -1.0; expected a number >= 0"),
        ({"lr": None}, r"lr is None; expected a number >= 0"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"weight_decay": math.inf}, r"weight_decay is inf; expected a number >= 0"),
        ({"damping": -0.1}, r"damping is -0.1; expected a number >= 0"),
        ({"refresh_every": 0}, r"refresh_every is 0; expected a whole number of at least 1, 10 by default"),
        ({"refresh_every": 2.5}, r"refresh_every is 2.5; expected a whole number"),
        (
            {"curvature": "costates"},
            r"curvature is 'costates'; expected 'gradient' or 'costate' or .*; did you mean 'costate'",
        ),
        ({"power": -1.0}, r"power is -1.0; expected a number from 0 to 1"),
        ({"power": 1e9}, r"power is 1000000000.0; expected a number from 0 to 1"),
        ({"adaptation": "no"}, r"adaptation is 'no'; expected a number >= 0 and below 100"),
        ({"adaptation": 1000}, r"adaptation is 1000; expected a number >= 0 and below 100"),
        ({"everywhere": "a"}, r"everywhere is 'a'; expected True or False"),
        ({"reduction": "none"}, r"reduction is 'none'; expected 'mean' or 'sum'"),
        (
            {"param_groups": [{"params": [nn.Parameter(torch.ones(2))]}]},
            r"a tensor of shape \(2,\) that is no parameter",
        ),
        ({"param_groups": [{"params": [], "lr": -2.0}]}, r"lr is -2.0"),
        ({"param_groups": [{"foo": 1}]}, r"a dictionary with \['foo'\], .* expected parameters .*model.head"),
        ({"param_groups": ["a"]}, r"can only optimize Tensors, but one of the params is str\); expected parameters"),
        ({"param_groups": 5}, r"one of the params is int\); expected parameters of the model"),
        ({"param_groups": {"params": ()}}, r"param_groups holds no parameter; expected one at least"),
        ({"param_groups": []}, r"param_groups holds no parameter; expected one at least"),
    ],
)
def test_wrong_arguments(options, message):
    layer = nn.Linear(3, 2)
    if "lr is -2.0" in message:
        options["param_groups"][0]["params"] = [layer.weight]
    with pytest.raises(ProblemError, match=message):
        SNOpt(layer, **{"lr": 0.01, **options})


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", math.nan, "lr is nan; expected a number >= 0"),
        ("lr", math.inf, "lr is inf; expected a number >= 0"),
        ("lr", -0.1, "lr is -0.1; expected a number >= 0"),
        ("lr", "0.1", "lr is '0.1'; expected a number >= 0"),
        ("lr", None, "lr is None; expected a number >= 0"),
        ("lr", torch.tensor(math.nan), "lr is nan; expected a number >= 0"),
        ("lr", torch.tensor([0.1, 0.1]), "lr is tensor([0.1000, 0.1000]"),
        ("momentum", 1.5, "momentum is 1.5; expected a number in [0, 1)"),
        ("weight_decay", True, "weight_decay is True; expected a number >= 0"),
        ("damping", math.nan, "damping is nan; expected a number >= 0"),
    ],
)
def test_an_option_written_later_changes_nothing(group, option, value, message):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    optimizer = SNOpt(model, param_groups=[{"params": layer.parameters()} for layer in (model[0], model[2])])
    backward(model, x)
    optimizer.step()
    right = optimizer.param_groups[group][option]
    before, state = copy.deepcopy(model.state_dict()), str(optimizer.state_dict())
    optimizer.param_groups[group][option] = value
    message = f"{re.escape(message)}.*, in param_groups.{group}., .* Parameters are as before this step: write another"
    with pytest.raises(ProblemError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.param_groups[group][option] = right
    assert str(optimizer.state_dict()) == state
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("values", [{"lr": torch.tensor(0.02)}, {"lr": 2, "weight_decay": 1.5, "damping": 3}])
def test_other_numbers_written_later_are_taken(values):
    ends = []
    for read in (lambda value: value, float):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        optimizer = SNOpt(model)
        optimizer.param_groups[0].update({name: read(value) for name, value in values.items()})
        backward(model, x)
        optimizer.step()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


def test_wrong_models():
    with pytest.raises(ProblemError, match=r"model is generator; expected the nn.Module that is trained"):
        SNOpt(nn.Linear(3, 2).parameters(), 0.01)
    with pytest.raises(ProblemError, match="no trainable parameter"):
        SNOpt(nn.Linear(3, 2).requires_grad_(False), 0.01)
    with pytest.raises(ProblemError, match="cannot be observed"):
        SNOpt(Net(adjoint="backprop"), 0.01, curvature="costate")


def test_long_lists_of_names_are_cut():
    model = nn.Sequential(*[nn.Embedding(2, 2) for _ in range(9)])
    with pytest.warns(UserWarning, match=r"and 1 more$"):
        SNOpt(model, 0.01)


def test_complex_parameters():
    with pytest.raises(ProblemError, match=r"a parameter of shape \(3, 2\) is torch.complex64; expected real ones"):
        SNOpt(nn.Linear(2, 3, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "the state is NoneType; expected the state of an SNOpt"),
        ({"step_count": -5}, "step_count in the state holds -5; expected whole numbers from 0 on"),
        ({"step_count": "many"}, "step_count in the state holds 'many'"),
        ({"spent": "abc"}, "spent in the state is 'abc'; expected a list of numbers: the state is damaged"),
        ({"norms": 0}, "norms in the state is 0; expected a list of numbers: the state is damaged"),
        ({"spent": ["abc"]}, "spent in the state holds 'abc'; expected whole numbers from 0 on"),
        ({"norms": [1.0, math.nan]}, "norms in the state holds nan; expected finite numbers from 0 on"),
        ({"factor": math.nan}, "factor in the state holds nan; expected finite numbers from 0.01 to 50"),
        ({"factor": -3.0}, "factor in the state holds -3.0"),
        ({"factor": 60.0}, "factor in the state holds 60.0"),
        ({"changed_at": -1}, "changed_at in the state holds -1; expected whole numbers from 0 to 1"),
        ({"changed_at": 2}, "changed_at in the state holds 2; expected whole numbers from 0 to 1"),
        ({"turns": 3}, "turns in the state is 3; expected a dictionary of dictionaries"),
        ({"turns": {"10": []}}, "turns in the state is {'10': []}; expected a dictionary"),
        ({"turns": {"10": {"spent": 3}}}, "spent in the state is 3; expected a list of numbers"),
        ({"turns": {"10": {"norms": [math.nan]}}}, "norms in the state holds nan; expected finite numbers"),
        ({"turns": {"10": {"largest": -1.0}}}, "largest in the state holds -1.0; expected finite numbers from 0 on"),
        ({"live": [True]}, "live in the state is [True]; expected a list that says of each parameter"),
        ({"live": "no"}, "live in the state is 'no'; expected a list"),
        ({"live": [1, 0]}, "2 times True or False: the state is damaged"),
        ({"momenta": math.nan}, "momentum of parameter 0 in the state holds NaN or infinity"),
        ({"moments": -1.0}, "moments of 'weight' in the state holds -1; expected no number below zero"),
        ({"input_factor": -1.0}, "input_factor of 'weight' in the state holds -1 on a diagonal; expected no number"),
        ({"step": -2.0}, "step of 'weight' in the state holds -2; expected no number below zero"),
        ({"lr": math.nan}, "lr is nan; expected"),
        ({"momentum": 1.0}, "momentum is 1.0; expected"),
        ({"state": 3}, "the state holds no dictionary for each parameter"),
        ({"param_groups": [{}]}, "or no groups with lists of 'params'"),
    ],
)
def test_a_damaged_state_is_refused(damage, message):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = SNOpt(layer)
    for _ in range(2):
        backward(layer, x)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if damage is not None and damage.keys() & {"factor", "changed_at"}:
        state["state"][0].update(damage)
    elif damage is not None and "momenta" in damage:
        state["state"][0]["momentum"][0, 0] = damage["momenta"]
    elif damage is not None and damage.keys() & {"moments", "input_factor", "step"}:
        for key, value in damage.items():
            state["state"][0][key].fill_(value)
    elif damage is not None and damage.keys() & optimizer.defaults.keys():
        state["param_groups"][0].update(damage)
    elif damage is not None:
        state.update(damage)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ProblemError, match=re.escape(message)):
        optimizer.load_state_dict(None if damage is None else state)
    assert str(optimizer.state_dict()) == str(kept)


def test_a_refused_state_leaves_the_hooks_as_they_were():
    model = Net(adjoint="backprop")
    optimizer = SNOpt(model)
    state = {**SNOpt(model).state_dict(), "curvature": "costate"}
    for _ in range(2):
        with pytest.raises(ProblemError, match="cannot be observed"):
            optimizer.load_state_dict(state)
    assert optimizer.curvature == "gradient"
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not model.ode.observers


LOOP = """
import torch, warnings
from torch import nn
from ocnopt.optim.snopt import SNOpt
layer, x = nn.Linear(3, 2), torch.randn(5, 3)
optimizer = SNOpt(layer)
layer.register_parameter("late", nn.Parameter(torch.ones(2)))
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    for k in range(4):
        optimizer.zero_grad()
        (layer(x) * layer.late).square().mean().backward()
        if k == 3:
            for p in (layer.weight, layer.bias):
                p.grad = 1e9 * optimizer.state[p]["change"]
        optimizer.step()
print(*(one.filename for one in heard))
"""


def test_warnings_point_at_the_step_of_the_user(tmp_path):
    script = tmp_path / "loop.py"  # a process of its own: type checks of the tests add calls in between
    script.write_text(LOOP)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(script)] * 2


@pytest.mark.parametrize("wrong", ["0.1", float("nan"), None])
def test_what_a_scheduler_began_with_is_checked_before_the_step(wrong):
    layer = nn.Linear(3, 2)
    optimizer, before = SNOpt(layer), layer.weight.clone()
    layer(torch.randn(5, 3)).square().mean().backward()
    optimizer.param_groups[0]["initial_lr"] = wrong
    with pytest.raises(ProblemError, match=r"initial_lr is .*expected a number >= 0, in param_groups\[0\]"):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert "momentum" not in optimizer.state[layer.weight]
