"""Gradients: discrete against back-propagation, continuous against a tight solve, both against torchdiffeq."""

import math

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from tests.neural.cases import Coupled, Plain, Tanh, assert_gradients_of_times, distance, gradients, loss, start

METHODS = [(name, 4) for name in sorted(TABLEAUS.keys() - {"adaptive_heun", "tsit5", "dopri8"})] + [
    (name, None) for name in ("adaptive_heun", "bosh3", "dopri5", "tsit5", "dopri8")
]
ROUTES = [
    (1.0, None),
    (Horizon(0.5, -1.0), None),
    (FreeHorizon(0.8, 0.1, 2.0), None),
    (1.0, [0.2, 0.5, 1.3]),
    (1.0, [0.0, 0.7]),
    (1.0, [1.0, 0.4, 0.0]),
    (1.0, [0.6]),
]


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
@pytest.mark.parametrize(("method", "steps"), [("dopri5", None), ("bosh3", None), ("rk4", 4), ("fehlberg2", None)])
def test_an_empty_batch(method, steps, adjoint):
    if method == "fehlberg2":
        pytest.importorskip("torchdiffeq")
    ode, x = NeuralODE(Tanh(), method=method, steps=steps, adjoint=adjoint), start(0, 3).requires_grad_()
    y = ode(x, [0.0, 0.5, 1.0])
    assert y.shape == (3, 0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 3)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ode.parameters())


class Watcher:
    """An observer that only counts."""

    def __init__(self):
        self.weights = []

    def stage(self, input_weight, gradient_weight):
        self.weights.append((input_weight, gradient_weight))
        return torch.enable_grad()

    def terminal(self, x, slope, costate):
        self.end = (x, slope, costate)


@pytest.mark.parametrize(("method", "steps"), METHODS)
@pytest.mark.parametrize(("horizon", "times"), ROUTES)
def test_discrete_is_back_propagation_through_the_same_steps(method, steps, horizon, times):
    field, x = Tanh(), start(4, 3)
    control = {"method": method, "steps": steps, "rtol": 1e-4, "atol": 1e-4}
    value, expected = gradients(NeuralODE(field, horizon, adjoint="backprop", **control), x, times)
    ode = NeuralODE(field, horizon, **control)
    ours, gradient = gradients(ode, x, times)
    assert torch.equal(ours, value)
    assert distance(gradient, expected) < 1e-12
    watcher = Watcher()
    ode.observe(watcher)
    _, watched = gradients(ode, x, times)
    assert distance(watched, expected) < 1e-12


@pytest.mark.parametrize(("method", "steps"), METHODS)
def test_thinned_checkpoints_change_nothing(method, steps):
    field, x = Tanh(), start(4, 3)
    tolerance = {2: 1e-4, 3: 1e-5, 5: 1e-9, 8: 1e-13}.get(TABLEAUS[method].order, 1.0)
    control = {"method": method, "steps": steps and 19, "rtol": tolerance, "atol": tolerance}
    _, expected = gradients(NeuralODE(field, 2.0, **control), x)
    one_state, replayed = x.numel() * 8, []
    for budget in (0, one_state, 10 * one_state):
        ode = NeuralODE(field, 2.0, checkpoint_bytes=budget, **control)
        replayed.append(gradients(ode, x)[1])
        # Steps whose graph was kept are pulled at once: their sums come in another order.
        assert distance(replayed[-1], expected) < 1e-14
        assert ode.statistics.steps > 8
        ode.observe(Watcher())
        assert distance(gradients(ode, x)[1], expected) < 1e-12
    assert torch.equal(replayed[1], replayed[0])


def test_thinning_keeps_about_the_square_root():
    field, x = Tanh(), start(1, 3)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        NeuralODE(field, method="euler", steps=400, checkpoint_bytes=0)(x)
    states = [tensor for tensor in kept if tensor.shape == x.shape]
    assert 14 <= len(states) <= 30


@pytest.mark.parametrize(("horizon", "times"), ROUTES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "dopri8"])
def test_continuous_meets_a_tight_solve(horizon, times, method):
    field, x = Tanh(), start(4, 3)
    _, expected = gradients(NeuralODE(field, horizon, rtol=1e-12, atol=1e-12), x, times)
    tolerance = 1e-8 if method == "bosh3" else 1e-9
    _, gradient = gradients(
        NeuralODE(field, horizon, method=method, rtol=tolerance, atol=tolerance, adjoint="continuous"), x, times
    )
    assert distance(gradient, expected) < 1e-6


def test_continuous_converges_on_a_grid():
    field, x = Tanh(), start(4, 3)
    _, expected = gradients(NeuralODE(field, rtol=1e-12, atol=1e-12), x)
    errors = []
    for steps in (10, 20):
        ode = NeuralODE(field, method="rk4", steps=steps, adjoint="continuous")
        errors.append(distance(gradients(ode, x)[1], expected))
    assert errors[1] < 1e-7
    assert 10 < errors[0] / errors[1] < 24


def test_continuous_does_not_care_for_the_scale_of_the_loss():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, adjoint="continuous")
    found = []
    for scale in (1.0, 1e-8):
        (scale * loss(ode(x))).backward()
        found.append(torch.cat([p.grad.flatten() for p in field.parameters()]) / scale)
        field.zero_grad()
    assert distance(found[1], found[0]) < 1e-12


def test_continuous_controls_the_steps_by_the_gradient_too():
    """At p = 0 neither x nor its costate moves; the gradient in p is the integral of sin(40 t)^2."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, t, x):
            return self.p * torch.sin(40 * t) ** 2 + 0 * x

    field, x = Idle(), torch.zeros(3, 1, dtype=torch.float64)
    NeuralODE(field, adjoint="continuous", rtol=1e-8, atol=1e-8)(x).mean().backward()
    assert float(field.p.grad) == pytest.approx(0.5 - math.sin(80.0) / 160, abs=1e-7)


def test_a_large_gradient_with_kinks_does_not_rule_the_steps():
    """The sum over samples and pixels is large, and ReLUs make it as rough as the costate."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    field, x = Plain(lambda t, x: net(x)), torch.randn(64, 16, 8, 8)
    field.net = net
    ode = NeuralODE(field, adjoint="continuous")
    ode(x).square().sum().backward()
    # 31 for 20; 73 to 109 where the column is not in units of its own
    assert ode.statistics.backward <= 2 * ode.statistics.forward


def test_continuous_keeps_nothing_per_step():
    field, x = Tanh(), start(4, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        NeuralODE(field, method="rk4", steps=50, adjoint="continuous")(x)
    # The start, the end, and the slope there.
    assert len([tensor for tensor in kept if tensor.shape == x.shape]) == 3


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
def test_a_tuple_state(adjoint):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, x = Coupled(), (start(4, 2), start(4, 2, 3), start(4))
    ode = NeuralODE(field, rtol=1e-9, atol=1e-9, adjoint=adjoint)
    output, gradient = gradients(ode, x, [0.0, 0.5, 1.0])
    parts = tuple(part.clone().requires_grad_() for part in x)
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    exact = torchdiffeq.odeint(field, parts, times, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(output, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    expected = torch.autograd.grad(loss(exact), (*parts, *field.parameters()))
    assert distance(gradient, torch.cat([part.flatten() for part in expected])) < 1e-6


def test_a_tuple_without_a_common_leading_axis():
    def function(t, state):
        x, clock = state
        return x * clock, torch.ones_like(clock)

    x, clock = start(5), torch.zeros((), dtype=torch.float64)
    ends = NeuralODE(Plain(function), 2.0, rtol=1e-9, atol=1e-9)((x, clock))
    assert float(ends[1]) == pytest.approx(2.0)
    torch.testing.assert_close(ends[0], x * torch.tensor(2.0, dtype=torch.float64).exp(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_discrete_against_finite_differences(method):
    weight = torch.tensor([[0.3, -0.8], [0.5, 0.2]], dtype=torch.float64)
    x = start(2)
    field = Plain(lambda t, x: torch.tanh(field.weight @ x) * (1 + t), weight=weight)
    ode = NeuralODE(field, method=method, steps=3)
    assert torch.autograd.gradcheck(lambda x: ode(x), (x.clone().requires_grad_(),))
    _, gradient = gradients(ode, x)
    eps = 1e-6
    for i in range(4):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                field.weight.view(-1)[i] += sign * eps
                ends.append(loss(ode(x)))
                field.weight.view(-1)[i] -= sign * eps
        assert float((ends[0] - ends[1]) / (2 * eps)) == pytest.approx(float(gradient[2 + i]), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [0.3, 0.9], [1.0, 0.2]])
def test_gradients_of_times(adjoint, times):
    field, x = Tanh(), start(4, 3)
    # Few steps of a rough method: only the exact gradient of the discrete solve meets the differences then.
    control = {"method": "heun", "steps": 7} if adjoint == "discrete" else {"rtol": 1e-10, "atol": 1e-10}
    ode = NeuralODE(field, adjoint=adjoint, **control)
    assert_gradients_of_times(ode, x, times)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_gradient_of_a_moving_start(adjoint):
    field, x = Tanh(), start(4, 3)

    def end(first):
        ode = NeuralODE(field, Horizon(first, 1.0), method="rk4", steps=6)
        return loss(ode(x, torch.tensor([first, 1.0], dtype=torch.float64))).detach()

    ode = NeuralODE(field, Horizon(0.2, 1.0), method="rk4", steps=6 if adjoint == "discrete" else 60, adjoint=adjoint)
    moving = torch.tensor([0.2, 1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(ode(x, moving)), moving)
    expected = float((end(0.2 + 1e-5) - end(0.2 - 1e-5)) / 2e-5)
    assert float(gradient[0]) == pytest.approx(expected, rel=1e-6 if adjoint == "discrete" else 1e-4)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_gradient_of_a_free_horizon(adjoint):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, FreeHorizon(0.8, 0.1, 2.0), rtol=1e-10, atol=1e-10, adjoint=adjoint)
    ode.T.requires_grad_()
    y = ode(x)
    (by_end, by_y) = torch.autograd.grad(loss(y), (ode.T, y))
    slope = field(ode.T.detach(), y)
    assert float(by_end) == pytest.approx(float((by_y * slope).sum().detach()), rel=1e-7)


def test_agrees_with_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, x = Tanh(), start(4, 3)
    times = torch.linspace(0.0, 2.0, 4, dtype=torch.float64)
    ours, gradient = gradients(NeuralODE(field, rtol=1e-10, atol=1e-10), x, times)
    leaf = x.clone().requires_grad_()
    theirs = torchdiffeq.odeint(field, leaf, times, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    expected = torch.autograd.grad(loss(theirs), (leaf, *field.parameters()))
    assert distance(gradient, torch.cat([part.flatten() for part in expected])) < 1e-7


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
@pytest.mark.parametrize("method", ["fehlberg2", "implicit_adams"])
def test_any_method_of_torchdiffeq(adjoint, method):
    pytest.importorskip("torchdiffeq")
    field, x = Tanh(), start(4, 3)
    _, expected = gradients(NeuralODE(field, rtol=1e-10, atol=1e-10), x, [0.5, 1.0])
    steps = 50 if method == "implicit_adams" else None
    ode = NeuralODE(field, method=method, rtol=1e-7, atol=1e-7, steps=steps, adjoint=adjoint)
    _, gradient = gradients(ode, x, [0.5, 1.0])
    assert distance(gradient, expected) < 1e-3
    assert ode.statistics.forward > 0
    assert (ode.statistics.backward > 0) == (adjoint == "continuous")
    with torch.no_grad():
        ode(x)


def test_the_solver_of_scipy():
    pytest.importorskip("torchdiffeq")
    field, x = Tanh(), start(4, 3)
    _, expected = gradients(NeuralODE(field, rtol=1e-10, atol=1e-10), x)
    ode = NeuralODE(field, method="scipy_solver", rtol=1e-8, atol=1e-8, adjoint="continuous")
    assert distance(gradients(ode, x)[1], expected) < 1e-5


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_frozen_and_unused_parameters_get_no_gradient(adjoint):
    field, x = Tanh(), start(4, 3)
    field.spare = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    field.inner.weight.requires_grad_(False)
    NeuralODE(field, adjoint=adjoint)(x).sum().backward()
    assert field.inner.weight.grad is None
    assert field.spare.grad is None
    assert field.inner.bias.grad is not None


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_parameters_of_several_dtypes(adjoint):
    """dx/dt = a + b + c: each gradient is one, in the dtype of its parameter."""
    kinds = {"a": torch.float64, "b": torch.float32, "c": torch.bfloat16}

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            for name, dtype in kinds.items():
                setattr(self, name, nn.Parameter(torch.ones(1, dtype=dtype)))

        def forward(self, t, x):
            return x.new_zeros(x.shape) + (self.a + self.b + self.c).to(x.dtype)

    field = Sum()
    NeuralODE(field, adjoint=adjoint)(torch.zeros(4, 1, dtype=torch.float32)).mean().backward()
    for name, dtype in kinds.items():
        gradient = getattr(field, name).grad
        assert gradient.dtype == dtype
        assert float(gradient) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_only_one_output_counts(adjoint):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, rtol=1e-10, atol=1e-10, adjoint=adjoint)
    states = ode(x, [0.3, 0.6, 1.0])
    found = torch.autograd.grad(states[1].sum(), [*field.parameters()])
    expected = torch.autograd.grad(NeuralODE(field, 0.6, rtol=1e-10, atol=1e-10)(x).sum(), [*field.parameters()])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_a_field_that_ignores_its_state(adjoint):
    field = Plain(lambda t, x: field.speed.expand_as(x), speed=torch.tensor(2.0, dtype=torch.float64))
    x = start(3).requires_grad_()
    NeuralODE(field, 1.5, adjoint=adjoint)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert float(field.speed.grad) == pytest.approx(4.5)


def test_a_constant_field_and_a_moving_end():
    field, x = Plain(lambda t, x: torch.ones_like(x)), start(3)
    moving = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    for adjoint in ("discrete", "continuous"):
        (gradient,) = torch.autograd.grad(NeuralODE(field, adjoint=adjoint)(x, moving)[-1].sum(), moving)
        torch.testing.assert_close(gradient, torch.tensor([-3.0, 3.0], dtype=torch.float64))


def test_two_backward_passes_agree():
    field, x = Tanh(), start(4, 3).requires_grad_()
    for adjoint in ("discrete", "continuous"):
        y = NeuralODE(field, adjoint=adjoint)(x).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_shared_field_in_two_solves():
    field, x = Tanh(), start(4, 3)
    both = torch.nn.Sequential(NeuralODE(field), torch.nn.ReLU(inplace=True), NeuralODE(field))
    plain = torch.nn.Sequential(
        NeuralODE(field, adjoint="backprop"), torch.nn.ReLU(), NeuralODE(field, adjoint="backprop")
    )
    found, expected = (torch.autograd.grad(loss(model(x)), [*field.parameters()]) for model in (both, plain))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)


def test_complex_parameters():
    """A real state may pass through complex numbers; the continuous adjoint integrates real gradients."""
    weight = torch.randn(3, 3, dtype=torch.complex128)
    field = Plain(lambda t, x: torch.view_as_real(torch.tanh(torch.complex(x, x**2) @ field.w)).sum(-1), w=weight)
    found = []
    for options in ({"adjoint": "backprop"}, {"checkpoint_bytes": 0}, {}, {"error_norm": "sample"}):
        ode = NeuralODE(field, rtol=1e-6, atol=1e-6, **options)
        found.append(torch.autograd.grad(loss(ode(start(1, 3) * 0 + 0.3)), field.w)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-10, atol=1e-12)
    for method in ("dopri5", "bosh3"):
        with pytest.raises(ProblemError, match=r"parameters of torch.complex128; expected real ones: torch.view_as_c"):
            NeuralODE(field, adjoint="continuous", method=method)(start(2, 3))
