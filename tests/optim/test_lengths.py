"""The factors of lr."""

import copy
import math

import pytest
import torch
from torch import nn

from ocnopt.optim.lengths import BOUNDS, Guard
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import backward

pytestmark = pytest.mark.usefixtures("float64")


def test_lr_of_each_matrix_follows_the_angle_between_its_gradient_and_its_last_step():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(7, 3)
    optimizer = SNOpt(model, 0.005, adaptation=0.4)
    groups = [[*part.parameters()] for part in (model[0], model[1], model[3])]  # the norm's are in no matrix
    expected, last = [1.0] * 3, None
    for _ in range(6):
        backward(model, x)
        before = [torch.cat([p.detach().flatten() for p in group]) for group in groups]
        for i, group in enumerate(groups if last else ()):
            gradient = torch.cat([p.grad.flatten() for p in group])
            expected[i] = max(expected[i], min(1.0, expected[i] ** 0.97 * math.exp(0.4 * 0.02))) * math.exp(
                -0.4 * float(gradient @ last[i] / (gradient.norm() * last[i].norm()))
            )
        optimizer.step()
        after = [torch.cat([p.detach().flatten() for p in group]) for group in groups]
        last = [one - other for one, other in zip(after, before, strict=True)]
        found = [*optimizer.factors.values()]
        assert found == pytest.approx([factor for factor in expected for _ in range(2)], rel=1e-9)
    assert [*optimizer.factors] == [name for name, _ in model.named_parameters()]
    for _ in range(60):  # opposite gradients: never below the least factor
        for p in model.parameters():
            p.grad = optimizer.state[p]["change"].clone()
        optimizer.step()
    assert {*optimizer.factors.values()} == {BOUNDS[0]}


def test_the_one_factor_of_an_earlier_state_is_that_of_each_parameter():
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer, other = SNOpt(layer), SNOpt(layer)
    backward(layer, x)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["factor"]
    other.load_state_dict({**state, "factor": 0.02})
    assert other.factors == {"weight": 0.02, "bias": 0.02}


@pytest.mark.parametrize(
    ("options", "most"),
    [({"lr": 0.0001}, 50.0), ({"lr": 0.01}, 5.0), ({"lr": 0.2}, 1.0), ({"lr": 0.001, "initial_lr": 0.02}, 2.5)],
    ids=str,
)
def test_a_factor_rises_until_lr_is_long_or_it_is_large(options, most):
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer = SNOpt(layer)
    optimizer.param_groups[0].update(options)
    backward(layer, x)
    optimizer.step()
    norms = [p.grad.norm() for p in layer.parameters()]
    for _ in range(20):  # gradients that ask for more of the last step
        for p, norm in zip(layer.parameters(), norms, strict=True):
            change = optimizer.state[p]["change"]
            p.grad = -norm / change.norm() * change
        optimizer.step()
    assert optimizer.factors == {"weight": pytest.approx(most), "bias": pytest.approx(most)}


@pytest.mark.parametrize("lr", [0.0, 0.005, 1.0])
def test_a_bias_moves_by_the_lr_of_its_own_group(lr):
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    together, apart = copy.deepcopy(layer), copy.deepcopy(layer)
    groups = [{"params": [apart.weight], "lr": lr}, {"params": [apart.bias], "lr": 0.03}]
    optimizers = SNOpt(together, 0.01), SNOpt(apart, param_groups=groups)
    before = layer.weight.clone(), layer.bias.clone()
    for model, optimizer in zip((together, apart), optimizers, strict=True):
        backward(model, x)
        optimizer.step()
    torch.testing.assert_close(apart.weight - before[0], lr / 0.01 * (together.weight - before[0]))
    torch.testing.assert_close(apart.bias - before[1], 3.0 * (together.bias - before[1]))


def test_a_factor_below_one_goes_back_where_steps_and_gradients_are_perpendicular():
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer = SNOpt(layer, 0.005)
    backward(layer, x)
    optimizer.step()
    for start, later in ((0.1, 0.1**0.97 * math.exp(3 * 0.02)), (0.99, 1.0), (1.0, 1.0), (3.0, 3.0)):
        for p in layer.parameters():
            optimizer.state[p]["factor"] = start
            p.grad = torch.randn_like(p)
            change = optimizer.state[p]["change"]
            p.grad -= (p.grad * change).sum() / change.square().sum() * change
        optimizer.load_state_dict({**optimizer.state_dict(), "norms": []})  # their length does not matter here
        optimizer.step()
        assert optimizer.factors == pytest.approx({"weight": later, "bias": later})


@pytest.mark.parametrize(("size", "jump"), [(2.9, 1.0), (6.0, 2.0), (1e3, 4.0)])
def test_a_gradient_far_longer_than_the_last_twenty_shortens_steps(size, jump):
    layer = nn.Linear(3, 2)
    optimizer = SNOpt(layer)

    def step(norm):  # further in the direction of the last change
        last = [optimizer.state.get(p, {}).get("change", -torch.ones_like(p)) for p in layer.parameters()]
        length = torch.cat([change.flatten() for change in last]).norm()
        for p, change in zip(layer.parameters(), last, strict=True):
            p.grad = -norm / length * change
        optimizer.step()

    for norm in (*[9.0] * 5, *[1.0] * 20):
        step(norm)
    for p in layer.parameters():
        optimizer.state[p]["factor"] = 0.1
    step(size)
    late = math.sqrt((19 + min(size, 3.0) ** 2) / 20)  # what stands out counts as three of the usual
    shortened = 0.1**0.97 * math.exp(3 * (0.02 * min(1.0, late / 9) + 1)) / jump
    assert optimizer.factors == pytest.approx({"weight": shortened, "bias": shortened})


@pytest.mark.parametrize(("late", "most"), [(1.0, 5.0), (0.0625, 2.5), (1e-6, 1.0)])
def test_factors_above_one_are_for_gradients_that_are_large_still(late, most):
    layer = nn.Linear(3, 2)
    optimizer = SNOpt(layer)
    for i in range(40):
        for p in layer.parameters():
            last = optimizer.state.get(p, {}).get("change", torch.ones_like(p))
            p.grad = -(1.0 if i < 19 else late) / last.norm() * last
        optimizer.step()
    assert optimizer.factors == pytest.approx({"weight": most, "bias": most})
    saved = optimizer.state_dict()
    other = SNOpt(nn.Linear(3, 2))
    other.load_state_dict(saved)
    assert saved["largest"] == other.state_dict()["largest"] == pytest.approx(math.sqrt(2.0))


def test_one_gradient_that_stands_out_is_no_measure_of_the_others():
    guard = Guard()
    for i in range(60):
        guard.judge(0, 1000.0 if i == 30 else 1.0, [])
    assert guard.largest == pytest.approx(math.sqrt((19 + 9) / 20))
    assert guard.decline() > 0.8


@pytest.mark.parametrize("at", range(5))
def test_nor_is_one_of_the_first(at):
    guard, usual = Guard(), Guard()
    for i in range(60):
        guard.judge(0, 1000.0 if i == at else 1.0, [])
        usual.judge(0, 1.0, [])
        if i in (at, 4, 7):
            guard = Guard(guard.state())  # as one that is loaded
    assert guard.largest <= 3.0
    assert guard.decline() >= 1 / 3
    assert usual.largest == 1.0


def test_the_most_that_gradients_were_of_late():
    guard = Guard({"norms": [3.0, 4.0] * 3})  # as a version before saved it
    assert guard.largest == pytest.approx(math.sqrt(12.5))
    assert Guard().decline() == Guard({"norms": [0.0]}).decline() == 1.0
    for _ in range(30):
        guard.judge(0, 1.0, [])
    assert guard.decline() == pytest.approx(12.5**-0.5)
    guard.forget_gradients()
    assert guard.decline() == 1.0


def test_gradients_jump_by_what_they_exceed_three_times_the_root_mean_square_of_the_last_ones():
    assert Guard().jump() == Guard({"norms": [5.0]}).jump() == Guard({"norms": [0.0, 5.0]}).jump() == 1.0
    norms = [3.0, 4.0, 3.0 * 2.5 * math.sqrt(12.5)]
    assert Guard({"norms": norms}).jump() == pytest.approx(2.5)
    assert Guard({"norms": [1e200, 9e200]}).jump() == pytest.approx(3.0)


@pytest.mark.parametrize("order", [("rare", "usual"), ("usual", "rare")])
def test_what_comes_back_takes_the_factor_that_the_others_have_by_now(order):
    model = nn.ParameterDict({name: torch.ones(3) for name in order})
    optimizer = SNOpt(model)
    for i in range(30):  # gradients that turn round each time
        model["usual"].grad = torch.full((3,), (-1.0) ** i)
        model["rare"].grad = torch.full((3,), 1e-6) if i in (0, 29) else None
        optimizer.step()
    assert optimizer.factors == {"usual": BOUNDS[0], "rare": BOUNDS[0]}
