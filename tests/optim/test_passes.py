"""What a pass finds belongs to a step if that pass reaches ``.grad``: gradients taken aside leave it alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.shares import Shares
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Model, gather, loss

pytestmark = pytest.mark.usefixtures("float64")


def aside(model, x, y):
    """A gradient that is taken for its own sake: what the pixels, and the weights, are to another loss."""
    return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()], retain_graph=True)


def run(model, x, takes):
    """A backward pass, with gradients taken ``aside`` before and after."""
    y = model(x)
    if takes:
        aside(model, x, y)
    y.square().sum(1).mean().backward(retain_graph=True)
    if takes:
        aside(model, x, y)
        aside(model, x, model(x))


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_samples_are_those_of_the_passes_that_reach_the_gradients(adjoint):
    model, x = Model(), torch.randn(4, 2, requires_grad=True)
    model.ode.adjoint = adjoint
    expected = gather(model, lambda: run(model, x, takes=False))
    model.zero_grad()
    taken = gather(model, lambda: run(model, x, takes=True))
    assert len(taken) == len(expected) == 3
    for layer, samples in expected.items():
        torch.testing.assert_close(taken[layer], samples, rtol=0, atol=0)


@pytest.mark.parametrize("curvature", ["published", "gauss_newton"])
def test_the_end_time_feels_the_passes_that_reach_the_gradients(curvature):
    plain, x, moved = Model(), torch.randn(4, 2, requires_grad=True), []
    for takes in (False, True):
        model = copy.deepcopy(plain)
        policy = HorizonPolicy(model.ode, curvature=curvature, lr=0.1)
        run(model, x, takes)
        with torch.no_grad():
            model.ode.field.inner.weight += 0.01
        policy.step()
        moved.append(model.ode.T)
    assert moved[0] != plain.ode.T
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=0)


class Pair(nn.Module):
    """A field of a pair of states."""

    def forward(self, t, state):
        x, y = state
        return y, -x


@pytest.mark.parametrize("rule", ["feedback", "adjoint"])
@pytest.mark.parametrize("options", [{}, {"checkpoint_bytes": 0}, {"adjoint": "continuous"}, {"error_norm": "sample"}])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_end_time_of_a_field_with_nothing_to_train_is_felt_though_it_is_fed_with_data(rule, options, by_name):
    data, moved = (torch.randn(4, 2), torch.randn(4, 2)), []
    for needs in (True, False):
        ode = NeuralODE(Pair(), FreeHorizon(initial=1.0, lower=0.1, upper=3.0), **options)
        policy = HorizonPolicy(ode, rule=rule, lr=0.1)
        state = tuple(part.clone().requires_grad_(needs) for part in data)
        for _ in range(2):
            end, _ = ode(x=state) if by_name else ode(state)
            end.square().sum(1).mean().backward()
            policy.step()
        moved.append(ode.T.clone())
        assert needs or all(part.grad is None and not part.requires_grad for part in state)
    assert moved[0] != 1.0
    assert torch.equal(*moved)


def test_a_field_with_nothing_to_train_is_not_followed_without_gradients():
    ode = NeuralODE(Pair(), FreeHorizon(initial=1.0, lower=0.1, upper=3.0))
    _policy = HorizonPolicy(ode)
    with torch.no_grad():
        assert not ode((torch.randn(4, 2), torch.randn(4, 2)))[0].requires_grad


def test_two_losses_of_the_same_samples_add_up():
    model, x = Model(), torch.randn(4, 2)

    def both(together):
        y = model(x)
        losses = [y.square().sum(1).mean(), y.sin().sum(1).mean()]
        for each in [sum(losses)] if together else losses:
            each.backward(retain_graph=True)

    shares, taken = [], []
    for together in (True, False):
        model.zero_grad()
        watching = Shares([*model.ode.parameters()], None, keep=False, replay=True)
        watching.attach(model.ode, handles := [])
        taken.append(gather(model, lambda: both(together)))  # noqa: B023
        (seen,) = watching.take()
        ((felt,),) = seen.solves.values()
        shares.append((seen.shares, felt))
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(*shares)
    for layer, samples in taken[0].items():
        torch.testing.assert_close(taken[1][layer], samples)


class Within(torch.autograd.Function):
    """A part of a model whose backward pass takes it again, or goes through a graph that was kept, by a pass within."""

    @staticmethod
    def forward(ctx, part, again, x, *parameters):
        ctx.part, ctx.again, ctx.parameters = part, again, parameters
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = part(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, cotangent):
        with torch.enable_grad():
            y = ctx.part(ctx.x) if ctx.again else ctx.y
        return None, None, *torch.autograd.grad(y, [ctx.x, *ctx.parameters], cotangent)


@pytest.mark.parametrize("kind", ["checkpoint", "again", "kept"])
def test_passes_within_a_pass_are_of_it(kind):
    model, x = Model(), torch.randn(4, 2, requires_grad=True)

    def wrapped(x):
        if kind == "checkpoint":
            return checkpoint(model, x, use_reentrant=True)
        return Within.apply(model, kind == "again", x, *model.parameters())

    expected = gather(model, lambda: loss(model, x).backward())
    model.zero_grad()
    taken = gather(model, lambda: wrapped(x).square().sum(1).mean().backward())
    assert len(taken) == 3
    for layer, samples in expected.items():
        torch.testing.assert_close(taken[layer], samples)


@pytest.mark.parametrize("place", [0, 2])
def test_the_dearest_solve_with_gradients_tells_of_an_explosion(place):
    model, x = Model(), torch.randn(4, 2)
    optimizer = SNOpt(model, 0.01)
    for i in range(8):
        optimizer.zero_grad()
        for j in range(3):
            loss(model, x).backward()
            if i == 7 and j == place:
                model.ode.statistics.forward *= 100
        with torch.no_grad():  # a dear one that is not of the step
            loss(model, x)
            model.ode.statistics.forward *= 100
        if i < 7:
            optimizer.step()
    with pytest.warns(
        UserWarning, match="raised the evaluations of the field from at most 8 to 800 and was taken back"
    ):
        optimizer.step()
    assert model.ode.read_most_evaluations() == 800
    loss(model, x)
    assert model.ode.read_most_evaluations() == 8
