"""Curvature of the likelihood against dense Gauss-Newton matrices, and SNOpt with every curvature."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import ocnopt as oc
from ocnopt.differential.kronecker import is_layer
from ocnopt.optim.sampling import cotangents
from tests.optim.cases import Net

pytestmark = pytest.mark.usefixtures("float64")

CURVATURES = ("gradient", "costate", "mixed", "sampled", "gauss_newton")


def hessian(z, likelihood):
    """Of -log p for each sample ``(B, C, C)``."""
    if likelihood == "gaussian":
        return torch.eye(z.shape[1]).expand(len(z), -1, -1)
    p = z.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_columns_make_the_curvature_of_the_likelihood(likelihood):
    z = torch.randn(3, 4)
    exact = torch.stack([*cotangents(z, likelihood, draws=None)])
    assert len(exact) == 4
    torch.testing.assert_close(torch.einsum("cbi,cbj->bij", exact, exact) / 4, hessian(z, likelihood))
    drawn = torch.stack([*cotangents(z, likelihood, draws=4000)])
    torch.testing.assert_close(
        torch.einsum("cbi,cbj->bij", drawn, drawn) / 4000, hessian(z, likelihood), rtol=0, atol=0.1
    )


def test_columns_of_logits_at_places():
    z = torch.randn(2, 5, 3)
    drawn = torch.stack([*cotangents(z, "categorical", draws=6000)]).flatten(2)
    dense = torch.stack([torch.block_diag(*hessian(one, "categorical")) for one in z])
    torch.testing.assert_close(torch.einsum("cbi,cbj->bij", drawn, drawn) / 6000, dense, rtol=0, atol=0.05)


@pytest.mark.parametrize(("likelihood", "loss"), [("categorical", "cross"), ("gaussian", "square")])
def test_factors_are_those_of_the_gauss_newton_matrix(likelihood, loss):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    optimizer = oc.SNOpt(net, curvature="gauss_newton")
    z = net(x)
    optimizer.sample(z, likelihood)
    assert all(parameter.grad is None for parameter in net.parameters())
    hidden = net[1](net[0](x)).detach()
    H = hessian(z.detach(), likelihood)
    through = net[2].weight.detach()[None] * (1 - hidden.square())[:, None, :]  # dz/dy of the first layer
    expected = {net[2]: H, net[0]: through.mT @ H @ through}
    for layer, dense in expected.items():
        rows = torch.cat([each[layer].gradients[0] for each in optimizer._drawn])
        torch.testing.assert_close(rows.mT @ rows / len(rows), dense.mean(0))
    target = torch.randint(2, (6,)) if loss == "cross" else torch.randn(6, 2)
    value = functional.cross_entropy(z, target) if loss == "cross" else functional.mse_loss(z, target)
    value.backward()
    optimizer.step()


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_the_gradient_is_that_without_sampling(adjoint):
    net, x = Net(adjoint=adjoint), torch.randn(4, 2, 5, 5)
    plain = torch.autograd.grad(net(x).square().mean(), [*net.parameters()])
    optimizer = oc.SNOpt(net, curvature="sampled")
    outputs = net(x)
    optimizer.sample(outputs, "gaussian", draws=2)
    outputs.square().mean().backward()
    for parameter, expected in zip(net.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)
    covered = {module for module in net.modules() if is_layer(module)}
    assert {layer for each in optimizer._drawn for layer in each} == covered


@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_curvature_trains_and_resumes(curvature):
    x = torch.randn(12, 2, 5, 5)
    target = torch.randint(3, (12,))

    def train(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            outputs = net(x)
            if curvature in ("sampled", "gauss_newton"):
                torch.manual_seed(0)
                optimizer.sample(outputs, "categorical")
            loss = functional.cross_entropy(outputs, target)
            loss.backward()
            optimizer.step()
        return loss.item()

    net = Net()
    optimizer = oc.SNOpt(net, curvature=curvature, refresh_every=2)
    first = train(net, optimizer, 1)
    again = Net()
    again.load_state_dict(net.state_dict())
    resumed = oc.SNOpt(again)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.curvature == curvature
    last = train(net, optimizer, 5)
    assert last < first
    assert train(again, resumed, 5) == pytest.approx(last, rel=1e-9)


def test_mixed_factors_are_of_both_kinds():
    torch.manual_seed(0)
    start = nn.Linear(3, 2)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    bases = {}
    for curvature in ("gradient", "costate", "mixed"):
        layer = nn.Linear(3, 2)
        layer.load_state_dict(start.state_dict())
        optimizer = oc.SNOpt(layer, curvature=curvature)
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        bases[curvature] = optimizer.state[layer.weight]
    assert torch.equal(bases["mixed"]["input_vectors"], bases["gradient"]["input_vectors"])
    assert torch.equal(bases["mixed"]["output_vectors"], bases["costate"]["output_vectors"])
    assert not torch.equal(bases["gradient"]["output_vectors"], bases["costate"]["output_vectors"])


def test_the_published_division_is_kfac_with_second_moments():
    layer = nn.Linear(2, 2, bias=False)
    x, y = torch.randn(5, 2), torch.randn(5, 2)
    optimizer = oc.SNOpt(layer, lr=0.1, power=1, length="division", adaptation=0, damping=0.5)
    before = layer.weight.detach().clone()
    (layer(x) - y).square().mean().backward()
    G = layer.weight.grad.clone()
    optimizer.step()
    B, A = (torch.linalg.eigh(factor)[1].flip(-1) for factor in (G @ G.T, G.T @ G))
    turned = B.T @ G @ A
    s = optimizer.state[layer.weight]["moments"][0]
    expected = before - 0.1 * B @ (turned / (s + 0.5 * s.mean())) @ A.T
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_leaves_outside_of_the_model_get_no_gradient():
    net, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    optimizer = oc.SNOpt(net, curvature="sampled")
    optimizer.sample(net(x), "categorical")
    assert x.grad is None


def test_draws_of_a_batch_that_was_thrown_away_are_forgotten():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = oc.SNOpt(net, curvature="sampled")

    def draw(backward=True):
        z = net(x)
        optimizer.sample(z, "gaussian")
        if backward:
            z.square().mean().backward()
        return len(optimizer._drawn)

    assert draw() == 1
    assert draw() == 2  # accumulated
    optimizer.zero_grad()
    assert draw(backward=False) == 1
    assert draw() == 1
    net.weight.grad.fill_(float("nan"))
    with pytest.raises(oc.NonFiniteError):
        optimizer.step()
    optimizer.zero_grad()
    assert draw() == 1
    optimizer.step()
    assert not optimizer._drawn


def test_a_policy_would_take_drawn_passes_for_those_of_the_loss():
    net = Net(horizon=oc.FreeHorizon(1.0, 0.5, 2.0))
    policy = oc.HorizonPolicy(net.ode)
    optimizer = oc.SNOpt(net, curvature="sampled")
    outputs = net(torch.randn(4, 2, 5, 5))
    with pytest.raises(oc.ProblemError, match="that something else observes"):
        optimizer.sample(outputs, "gaussian")
    assert policy is not None


def test_what_cannot_be_sampled():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(oc.ProblemError, match="takes nothing from it; expected one of sampled, gauss_newton"):
        oc.SNOpt(net).sample(net(x), "categorical")
    optimizer = oc.SNOpt(net, curvature="sampled")
    for outputs, came in ((net(x).detach(), "without a graph"), (net(x)[0], "shape"), (None, "NoneType")):
        with pytest.raises(oc.ProblemError, match=came):
            optimizer.sample(outputs, "categorical")
    with pytest.raises(oc.ProblemError, match="likelihood"):
        optimizer.sample(net(x), "poisson")
    with pytest.raises(oc.ProblemError, match="draws"):
        optimizer.sample(net(x), "gaussian", draws=0)
    exact = oc.SNOpt(net, curvature="gauss_newton")
    with pytest.raises(oc.ProblemError, match="several labels a sample"):
        exact.sample(net(x)[:, None], "categorical")
    before = net.weight.detach().clone()
    net(x).sum().backward()
    with pytest.raises(oc.ProblemError, match="without sample"):
        optimizer.step()
    assert torch.equal(net.weight, before)
    with pytest.raises(oc.ProblemError, match="length"):
        oc.SNOpt(net, length="newton")
