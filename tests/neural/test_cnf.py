"""Continuous normalising flows against the Jacobian of their map, against quadrature, and back again."""

import math

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.neural.cnf import CNF
from ocnopt.ocp import FreeHorizon, Horizon
from ocnopt.optim.snopt import SNOpt
from ocnopt.problems.learning.fields import Squash, TimeLinear, TimeNet
from tests.oracles.compare import assert_close

TIGHT = {"method": "dopri8", "rtol": 1e-8, "atol": 1e-8}


def flow(dimension=2, layer=Squash, scale=2.0, **options):
    net = TimeNet(layer, (dimension, 8, dimension))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return CNF(net, dimension, **{"trace": "exact", **TIGHT, **options})


class Linear(nn.Module):
    """F = A z: the divergence is the same everywhere, and its estimate knows only e1 e2."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.3, 0.5], [-0.1, 0.4]]))

    def forward(self, t, z):
        return z @ self.A.T


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("horizon", [Horizon(1.0, 0.0), FreeHorizon(0.8, 0.1, 2.0)])
def test_the_density_is_that_of_the_map(horizon):
    model, x = flow(3, horizon=horizon), torch.randn(4, 3)
    z, log_determinant = model.encode(x)
    J = torch.autograd.functional.jacobian(lambda x: model.encode(x)[0].sum(0), x).transpose(0, 1)
    assert_close(log_determinant.detach(), torch.linalg.slogdet(J)[1], atol=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert_close(model.log_prob(x).detach(), (normal + log_determinant).detach(), atol=1e-12)
    assert_close(model.decode(z).detach(), x, atol=1e-6)
    assert float((z - x).detach().abs().max()) > 0.1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_density_is_the_same_without_gradients(mode):
    model, x = flow(2), torch.randn(4, 2)
    expected = model(x)
    with mode():
        found, (time, _) = model(x + 0.0), model.ode.until(lambda t, z: t - 0.5, x + 0.0)
    assert_close(found, expected.detach(), atol=1e-12)
    assert float(time) == pytest.approx(0.5)
    assert not found.requires_grad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dimension", [1, 2])
def test_the_density_integrates_to_one(dimension):
    model = flow(dimension, method="dopri5", rtol=1e-6, atol=1e-6)
    line = torch.linspace(-9, 9, 91)
    points = torch.cartesian_prod(*[line] * dimension).reshape(-1, dimension)
    with torch.no_grad():
        total = model.log_prob(points).exp().sum() * (line[1] - line[0]) ** dimension
    assert float(total) == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("float64")
def test_hutchinson_s_estimate_and_its_mean():
    model = CNF(Linear(), 2, **TIGHT)
    _, estimates = model.encode(torch.zeros(64, 2))
    # from t = 1 back to 0: -e^T A e, either of two values with the exact trace half-way between them
    assert_close(estimates.detach().unique().round(decimals=9), torch.tensor([-1.1, -0.3]).unique(), atol=1e-8)
    model.eval()
    assert_close(model.encode(torch.zeros(3, 2))[1].detach(), torch.full((3,), -0.7), atol=1e-8)
    gaussian = CNF(Linear(), 2, noise="gaussian", **TIGHT)
    assert float(gaussian.encode(torch.zeros(4000, 2))[1].detach().mean()) == pytest.approx(-0.7, abs=0.05)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"checkpoint_bytes": 1}, {"adjoint": "continuous"}])
@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_gradients_are_those_of_back_propagation(trace, options):
    x, tolerance = torch.randn(5, 2), 1e-6 if options.get("adjoint") else 1e-3

    def gradients(**options):
        torch.manual_seed(1)
        model = flow(trace=trace, method="dopri5", rtol=tolerance, atol=tolerance, **options)
        # Two draws of noise in one loss: each backward pass must meet its own.
        (model(x).sum() + 2 * model(x + 1).sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    for found, wanted in zip(gradients(**options), gradients(adjoint="backprop"), strict=True):
        assert_close(found, wanted, atol=1e-3 if options.get("adjoint") else 1e-10)


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_field_that_does_not_see_the_state_keeps_volumes(trained, trace):
    class Drift(nn.Module):
        def __init__(self):
            super().__init__()
            self.speed = nn.Parameter(torch.ones(2), requires_grad=trained)

        def forward(self, t, z):
            return self.speed.expand_as(z)

    model, x = CNF(Drift(), 2, trace=trace), torch.randn(3, 2, requires_grad=True)
    z, log_determinant = model.encode(x)
    assert_close(z.detach(), x.detach() - 1, atol=1e-5)
    assert not log_determinant.any()
    model(x).sum().backward()
    assert_close(x.grad, 1 - x.detach(), atol=1e-5)
    assert not trained or model.ode.field.net.speed.grad.abs().sum() > 0


@pytest.mark.usefixtures("float64")
def test_samples_follow_the_density():
    """F = -z over one unit makes the standard deviation e; a path ends where the sample is."""

    class Shrink(nn.Module):
        def forward(self, t, z):
            return -z

    model = CNF(Shrink(), 2, 1.0)
    assert float(model.sample(4000).std()) == pytest.approx(math.e, rel=0.05)
    assert_close(
        model.bits(torch.zeros(1, 2)), torch.tensor([(math.log(2 * math.pi) / 2 + 1) / math.log(2)]), atol=1e-4
    )
    z = torch.ones(1, 2)
    assert_close(model.ode(z, model.times(5))[-1], math.e * z, atol=1e-3)
    assert_close(model.decode(z), math.e * z, atol=1e-3)


def test_a_flow_of_images_trains():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))

        def forward(self, t, z):
            return self.net(z)

    model = CNF(Field(), (1, 3, 3), rtol=1e-3, atol=1e-3)
    optimizer = SNOpt(model)
    data = 2 + 0.1 * torch.randn(32, 1, 3, 3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -model(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    model.eval()
    with torch.no_grad():
        assert not model(data).requires_grad
        assert torch.equal(model(data), model(data))
    assert model.sample(3).shape == (3, 1, 3, 3)
    assert set(model.state_dict()) == {f"ode.field.net.net.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace": "full"}, "trace is 'full'; expected .*hutchinson"),
        ({"noise": "uniform"}, "noise is 'uniform'; expected .*rademacher"),
        ({"shape": 0}, "shape is 0; expected a positive number of entries"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ProblemError, match=message):
        CNF(**{"field": TimeNet(TimeLinear, (2, 2)), "shape": 2, **change})


def test_samples_of_another_shape():
    with pytest.raises(ProblemError, match=r"samples have shape \(4, 3\); expected \(B, 2\)"):
        flow()(torch.zeros(4, 3))
    with pytest.raises(ProblemError, match="count is 0; expected a whole number"):
        flow().sample(0)
