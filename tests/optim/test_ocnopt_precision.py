"""OCNOpt under autocast, in half precision, and with scaled losses."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ocnopt.errors import ProblemError
from ocnopt.neural.tape import Tape
from ocnopt.optim.ocnopt import OCNOpt
from tests.optim.test_ocnopt_use import data, differ, net, new, step

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]


def tapes():
    gc.collect()
    return sum(type(thing) is Tape for thing in gc.get_objects())


@pytest.mark.parametrize("form", ["batch", "sample", "gauss_newton"])
@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_autocast(curvature, form, place):
    """Whatever a training loop puts inside of its autocast context; factors and weights stay in float32."""
    model = new(norm=nn.GroupNorm).float()
    start = copy.deepcopy(model)
    tikhonov = 0.1 if form == "sample" else 0.0
    optimizer = OCNOpt(model, 0.1, curvature=curvature, form=form, tikhonov=tikhonov, damping=1.0)
    x, y = data()
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        value = cross_entropy(model(x), y)
        if place != "forward":
            value.backward()
        if place == "step":
            optimizer.step()
    if place == "forward":
        value.backward()
    if place != "step":
        optimizer.step()
    other = OCNOpt(start, 0.1, curvature=curvature, form=form, tikhonov=tikhonov, damping=1.0)
    cross_entropy(start(x), y).backward()
    other.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(w.dtype == torch.float32 for _, w in optimizer.answers.values())
    for (_, w), (_, exact) in zip(optimizer.answers.values(), other.answers.values(), strict=True):
        assert w.isfinite().all()
        if curvature == "identity":  # others divide by squares of gradients
            torch.testing.assert_close(w, exact, rtol=0.0, atol=0.2)


def test_a_step_in_autocast_leaves_no_cast_weights():
    """The next pass in the same context meets the new weights, with their gradients."""
    model = net().float()
    optimizer = OCNOpt(model, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            x = torch.ones(4, 3, dtype=torch.float32)
            step(optimizer, model, x)
        output = model(x)
        output.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output, model(x))
    assert all(p.grad.any() for p in model.parameters())


def test_bfloat16():
    model = net().bfloat16()
    optimizer = OCNOpt(model, 0.1)
    x = torch.randn(8, 3).bfloat16()
    losses = [step(optimizer, model, x) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_scaled_loss_trains_as_an_unscaled_one(steps):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    one, two = new(), new()
    optimizers = OCNOpt(one, 0.1), OCNOpt(two, 0.1)
    for _ in range(steps):
        x, y = data()
        for model, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            value = cross_entropy(model(x), y)
            (value if model is one else scaler.scale(value)).backward()
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert differ(one, two) < 1e-12


@pytest.mark.parametrize("feedback", [True, False])
def test_a_step_that_the_scaler_skips_moves_nothing(feedback):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    model = net()
    optimizer, before = OCNOpt(model, 0.1, feedback=feedback), copy.deepcopy(model.state_dict())
    scaler.scale(1e308 * model(torch.randn(4, 3)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.answers
    optimizer.zero_grad()
    scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
    scaler.step(optimizer)


def test_gradients_unscaled_before_the_step():
    for feedback in (True, False):
        scaler, model = torch.amp.GradScaler("cpu"), net()
        optimizer, before = OCNOpt(model, 0.1, feedback=feedback), copy.deepcopy(model.state_dict())
        scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
        scaler.unscale_(optimizer)
        if feedback:
            with pytest.raises(ProblemError, match=r"GradScaler.unscale_ met OCNOpt .*; expected scaler.step.*; |: "):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert moved is not feedback
