"""Neural ODEs with stiff fields: implicit steps, their gradients, and what cannot have them."""

import pytest
import torch
from torch import nn

from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.snopt import SNOpt
from tests.neural.cases import Plain, Tanh, assert_gradients_of_times, distance, gradients, loss, start


class VanDerPol(nn.Module):
    """Relaxes at once, then crawls."""

    def __init__(self, mu=1e3):
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu, dtype=torch.float64))

    def forward(self, t, x):
        position, speed = x.unbind(-1)
        return torch.stack([speed, self.mu * (1 - position**2) * speed - position], -1)


class Robertson(nn.Module):
    """Three reactions of very different speeds."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64))

    def forward(self, t, x):
        a, b, c = x.unbind(-1)
        slow, fast, back = self.k[0] * a, self.k[1] * b * b, self.k[2] * b * c
        return torch.stack([back - slow, slow - back - fast, fast], -1)


class Fast(nn.Module):
    """A network, one part of which relaxes a thousand times faster."""

    def __init__(self):
        super().__init__()
        self.net = Tanh(3)
        self.rates = nn.Parameter(torch.tensor([1e3, 1.0, 0.1], dtype=torch.float64))

    def forward(self, t, x):
        return self.net(t, x) - self.rates * (x - torch.sin(t))


def test_backprop_and_the_replayed_gradient_agree():
    field, x = Fast(), start(3, 3)
    options = {"method": "kvaerno5", "steps": 2}
    times = [0.0, 0.3, 0.6]
    for dense in (False, True):
        y, found = gradients(NeuralODE(field, dense=dense, **options), x, times)
        z, right = gradients(NeuralODE(field, adjoint="backprop", dense=dense, **options), x, times)
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-13)
        assert distance(found, right) < 1e-10


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_gradients_of_a_grid_are_differences_of_it(shape):
    field, x = Fast(), start(*shape)
    ode = NeuralODE(field, method="kvaerno5", steps=3)
    _, found = gradients(ode, x)
    vector = torch.nn.utils.parameters_to_vector(field.parameters()).detach()
    direction, eps = torch.cos(torch.arange(len(vector))).double() * vector, 1e-5
    ends = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(vector + sign * eps * direction, field.parameters())
        ends.append(loss(ode(x)).detach())
    torch.nn.utils.vector_to_parameters(vector, field.parameters())
    assert float((ends[0] - ends[1]) / (2 * eps)) == pytest.approx(float(found[x.numel() :] @ direction), rel=1e-7)


class Descent(nn.Module):
    """Goes down the energy log cosh(A x); by autograd, as the code of a user would, or by hand."""

    def __init__(self, way):
        super().__init__()
        self.way, self.A = way, nn.Parameter(torch.tensor([[1.0, 0.3], [-0.7, 0.2]], dtype=torch.float64))

    def forward(self, t, x):
        if self.way == "by hand":
            return -torch.tanh(x @ self.A) @ self.A.mT
        with torch.enable_grad():
            if self.way == "with a leaf of its own" and not x.requires_grad:
                x = x.detach().requires_grad_()
            return -torch.autograd.grad(torch.cosh(x @ self.A).log().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("adjoint", ["discrete", "backprop"])
def test_a_field_that_differentiates_inside(adjoint):
    rows, x = [], start(2, 2)
    for way in ("by hand", "on what it is given", "with a leaf of its own"):
        ode = NeuralODE(Descent(way), method="kvaerno5", steps=1, adjoint=adjoint)
        wanted = [leaf := x.clone().requires_grad_(), ode.field.A]
        first = torch.autograd.grad(loss(ode(leaf)), wanted, create_graph=True)
        second = torch.autograd.grad(sum(torch.sin(g).sum() for g in first), wanted)
        rows.append(torch.cat([g.detach().flatten() for g in (*first, *second)]))
    assert distance(rows[1], rows[0]) < 1e-10
    assert distance(rows[2], rows[0]) < 1e-10


def test_second_derivatives_times_and_events():
    field, x = Fast(), start(2, 3)
    rows = []
    for adjoint in ("discrete", "backprop"):
        ode = NeuralODE(field, method="kvaerno5", steps=2, adjoint=adjoint)
        wanted = [leaf := x.clone().requires_grad_(), *ode.parameters()]
        first = torch.autograd.grad(loss(ode(leaf)), wanted, create_graph=True)
        found = torch.autograd.grad(sum(torch.sin(g).sum() for g in first), wanted)
        rows.append(torch.cat([g.flatten() for g in found]))
    assert distance(*rows) < 1e-10
    assert_gradients_of_times(NeuralODE(field, method="kvaerno5", steps=2), x, [0.45, 0.9])
    time, _ = NeuralODE(Plain(lambda t, x: -50 * x), method="kvaerno5").until(lambda t, x: x[0] - 0.5, torch.ones(1))
    assert float(time.detach()) == pytest.approx(0.6931 / 50, rel=1e-2)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (2, 0)])
@pytest.mark.parametrize("steps", [None, 2])
def test_an_empty_batch_stays_empty(shape, steps):
    x = start(*shape).requires_grad_()
    y = NeuralODE(Plain(lambda t, x: -50 * x), method="kvaerno5", steps=steps)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_van_der_pol():
    field = VanDerPol()
    ode = NeuralODE(field, 500.0, method="kvaerno5", rtol=1e-6, atol=1e-6)
    y = ode(torch.tensor([2.0, 0.0], dtype=torch.float64))
    y[0].backward()
    # scipy's Radau at 1e-12, and a difference of it
    assert y[0].item() == pytest.approx(1.59676895, rel=1e-5)
    assert float(field.mu.grad) == pytest.approx(5.15194e-4, rel=1e-3)
    assert ode.statistics.steps < 30
    with pytest.raises(ConvergenceError, match="more than its 20 evaluations"):
        NeuralODE(field, 500.0, method="kvaerno5", max_evaluations=20)(y.detach())


def test_robertson():
    field = Robertson()
    ode = NeuralODE(field, 40.0, method="kvaerno5", rtol=1e-4, atol=1e-7)
    y = ode(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    y[0].backward()
    right = torch.tensor([0.715827069, 9.18553476e-6, 0.284163746], dtype=torch.float64)
    torch.testing.assert_close(y.detach(), right, rtol=1e-3, atol=0.0)
    by_k = torch.tensor([-4.24755925, -2.28835568e-9, 1.37308141e-5], dtype=torch.float64)
    torch.testing.assert_close(field.k.grad, by_k, rtol=1e-2, atol=0.0)


def test_it_trains_with_snopt():
    torch.manual_seed(0)
    model = nn.Sequential(NeuralODE(Fast(), method="kvaerno5", steps=1), nn.Linear(3, 1).double())
    x, losses = start(8, 3), []
    optimizer = SNOpt(model, lr=0.01, curvature="costate", refresh_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        value = (model(x) - 1.0).square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_an_observer_s_weights_and_gradients():
    """Each stage is seen once; what is seen of a layer sums to its gradient."""
    field, x = Fast(), start(2, 3)
    ode, seen, weights = NeuralODE(field, method="kvaerno5", steps=2), [], []

    class Watcher:
        def stage(self, input_weight, gradient_weight):
            weights.append(input_weight)
            handle = field.net.outer.register_forward_hook(lambda m, i, y: y.register_hook(seen.append) and None)

            class Context:
                def __enter__(self):
                    return None

                def __exit__(self, *exception):
                    handle.remove()

            return Context()

        def terminal(self, x, slope, costate):
            pass

    watched = ode.observe(Watcher())
    gradients(ode, x)
    watched.remove()
    assert sum(weights) == pytest.approx(1.0)
    bias = dict(zip([n for n, _ in field.named_parameters()], gradients_of(ode, x), strict=True))["net.outer.bias"]
    torch.testing.assert_close(torch.stack([g.sum(0) for g in seen]).sum(0), bias, rtol=1e-9, atol=1e-12)


def gradients_of(ode, x):
    return torch.autograd.grad(loss(ode(x)), [*ode.parameters()])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adjoint": "continuous"}, 'a stiff path runs away from itself; expected adjoint="discrete"'),
        ({"error_norm": "sample"}, "expected error control, which gives each sample steps"),
    ],
)
def test_what_does_not_go_together(options, match):
    with pytest.raises(ProblemError, match=match):
        NeuralODE(Tanh(), method="kvaerno5", **options)


def test_fields_that_cannot_be_solved_sample_by_sample():
    for function, match in (
        (lambda t, x: x - x.mean(0), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: torch.tanh(x.roll(2, 0)), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: x - x.view(2, 4, 3).mean(0).repeat(2, 1), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: x - t * x.mean(0), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: x - torch.relu(t - 0.75) * x.mean(0), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: x - (t < 0.25) * x.mean(0), "method='kvaerno5' met a field in which samples meet"),
        (lambda t, x: x * torch.rand(()).double(), "method='kvaerno5' met a field that draws random numbers"),
    ):
        with pytest.raises(ProblemError, match=match):
            NeuralODE(Plain(function), method="kvaerno5")(start(8, 3))
    with pytest.raises(ProblemError, match="stages are equations, which have no solution"):
        NeuralODE(Plain(lambda t, x: x * torch.rand(()).double()), method="kvaerno5")(start(3).requires_grad_())
