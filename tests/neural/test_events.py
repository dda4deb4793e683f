"""A path that ends where an event happens: closed forms, gradients against finite differences, words."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ocnopt.errors import ConvergenceError, NonFiniteError, OcnoptError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from tests.neural.cases import Plain, Tanh, distance, start
from tests.neural.test_gradients import Watcher

G = 9.81
METHODS = [("dopri5", None), ("tsit5", None), ("dopri8", None), ("bosh3", None), ("rk4", 7), ("midpoint", 9)]


class Fall(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(G, dtype=torch.float64))

    def forward(self, t, x):
        return torch.stack([x[..., 1], -self.g.expand_as(x[..., 1])], -1)


def height(t, x):
    return x[..., 0]


@pytest.mark.parametrize(("method", "steps"), METHODS)
@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
def test_a_fall(method, steps, adjoint):
    """All these methods are exact for parabolas."""
    field, x = Fall(), torch.tensor([10.0, 2.0], dtype=torch.float64, requires_grad=True)
    ode = NeuralODE(field, horizon=5.0, method=method, steps=steps, adjoint=adjoint)
    time, end = ode.until(height, x)
    root = math.sqrt(2.0**2 + 2 * G * 10.0)
    assert time.item() == pytest.approx((2.0 + root) / G, rel=1e-13)
    torch.testing.assert_close(end, torch.tensor([0.0, -root], dtype=torch.float64), rtol=1e-13, atol=1e-13)
    by_x, by_g = torch.autograd.grad(time, (x, field.g), retain_graph=True)
    exact = torch.tensor([1 / root, (1 + 2.0 / root) / G], dtype=torch.float64)
    torch.testing.assert_close(by_x, exact, rtol=1e-9, atol=0)
    assert float(by_g) == pytest.approx(10.0 / (root * G) - (2.0 + root) / G**2, rel=1e-9)
    speed = torch.autograd.grad(end[1], x)[0]
    torch.testing.assert_close(speed, torch.tensor([-G, -2.0], dtype=torch.float64) / root, rtol=1e-9, atol=0)


def test_a_bouncing_ball():
    """Each bounce keeps .8 of the speed: the times are a geometric series."""
    ode = NeuralODE(Fall(), horizon=10.0)
    x = drop = torch.tensor([5.0, 0.0], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for _ in range(6):
        time, x = ode.until(height, x)
        total, x = total + time, x * torch.tensor([0.0, -0.8], dtype=torch.float64)
    first = math.sqrt(2 * 5.0 / G)
    exact = first * (1 + 2 * sum(0.8**k for k in range(1, 6)))
    assert total.item() == pytest.approx(exact, rel=1e-12)
    assert float(torch.autograd.grad(total, drop)[0][0]) == pytest.approx(exact / (2 * 5.0), rel=1e-9)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_gradients_against_finite_differences(adjoint):
    field, x = Tanh(), start(4, 3)
    threshold = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    ode = NeuralODE(field, Horizon(0.5, -6.0), rtol=1e-10, atol=1e-10, adjoint=adjoint, checkpoint_bytes=0)

    def event(t, x):
        return x.mean() + 0.3 * t**2 - 0.3 * 0.5**2 - moved - threshold

    moved = float(x.mean())
    wanted = [x.requires_grad_(), threshold, field.inner.weight]

    def value():
        time, end = ode.until(event, x)
        return time.sin() + end.square().sum()

    found = torch.autograd.grad(value(), wanted)
    eps = 1e-5
    with torch.no_grad():
        for tensor, gradient in zip(wanted, found, strict=True):
            ends = []
            for sign in (1, -1):
                tensor.view(-1)[0] += sign * eps
                ends.append(value().item())
                tensor.view(-1)[0] -= sign * eps
            expected = (ends[0] - ends[1]) / (2 * eps)
            assert float(gradient.view(-1)[0]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


class Sinking(Tanh):
    def forward(self, t, x):
        return 0.1 * super().forward(t, x) - 1.0


@pytest.mark.parametrize(("steps", "direction"), [(None, 0), (None, -1), (40, 0)])
def test_the_way_back_of_the_costate_meets_no_event(direction, steps):
    """There the walk carries the costate beside the state, which the event does not know."""
    field, found = Sinking(2), []
    x = torch.tensor([[1.0, 0.5], [0.8, 0.2]], dtype=torch.float64, requires_grad=True)
    for adjoint in ("continuous", "discrete"):
        ode = NeuralODE(field, 4.0, rtol=1e-9, atol=1e-9, adjoint=adjoint, steps=steps)
        time, end = ode.until(lambda t, x: x[:, 0].mean() - 0.1, x, direction=direction)
        gradient = torch.autograd.grad(time + end.square().sum(), [x, *field.parameters()])
        found.append(torch.cat([g.flatten() for g in gradient]))
    assert distance(*found) < 1e-6


def test_the_discrete_gradient_is_that_of_back_propagation():
    field, x = Tanh(), start(4, 3)
    found = []
    for adjoint, budget in (("backprop", 0), ("discrete", 0), ("discrete", 2**28)):
        ode = NeuralODE(field, 4.0, adjoint=adjoint, checkpoint_bytes=budget)
        time, end = ode.until(lambda t, x: t - 1.7 + 0.1 * x[0, 0], x)
        gradient = torch.autograd.grad(time + end.sin().sum(), [*field.parameters()])
        found.append(torch.cat([time.detach()[None], *(g.flatten() for g in gradient)]))
    assert distance(found[1], found[0]) < 1e-12
    assert distance(found[2], found[0]) < 1e-12
    watcher = Watcher()
    ode.observe(watcher)
    time, _ = ode.until(lambda t, x: t - 1.7 + 0.1 * x[0, 0], x)
    time.backward()
    assert sum(weight for weight, _ in watcher.weights) == pytest.approx(time.item())


def test_directions():
    """sin crosses zero downwards at pi, upwards at 2 pi."""
    ode = NeuralODE(Plain(lambda t, x: torch.cos(t).expand_as(x)), 8.0, rtol=1e-10, atol=1e-10)
    x = torch.zeros(1, dtype=torch.float64)
    for direction, exact in ((0, math.pi), (-1, math.pi), (1, 2 * math.pi)):
        time, _ = ode.until(lambda t, x: x[0], x, direction=direction)
        assert time.item() == pytest.approx(exact, abs=1e-8)


def test_a_root_pair_within_one_step_is_seen():
    """The method takes the whole parabola in one step; the event holds from 0.4 to 0.6 alone."""
    ode = NeuralODE(Plain(lambda t, x: torch.ones_like(x)), 1.0, method="euler", steps=1)
    time, _ = ode.until(lambda t, x: (x[0] - 0.4) * (x[0] - 0.6), torch.zeros(1, dtype=torch.float64))
    assert time.item() == pytest.approx(0.4, abs=1e-14)
    assert ode.statistics.steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tuple_state_in_each_precision(dtype):
    def field(t, state):
        x, clock = state
        return -x, torch.ones_like(clock)

    x, clock = torch.full((3,), 2.0, dtype=dtype), torch.zeros((), dtype=dtype)
    ode = NeuralODE(Plain(field), FreeHorizon(3.0, 0.1, 5.0), rtol=1e-6, atol=1e-6)
    time, (end, told) = ode.until(lambda t, state: state[0][1] - 0.5, (x, clock))
    assert time.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-6
    assert time.item() == pytest.approx(math.log(4.0), abs=tolerance)
    assert told.item() == pytest.approx(time.item(), abs=tolerance)
    torch.testing.assert_close(end, torch.full_like(end, 0.5), rtol=0, atol=tolerance)


def test_what_does_not_happen_says_so():
    ode, x = NeuralODE(Fall(), horizon=1.0), torch.tensor([10.0, 0.0], dtype=torch.float64)
    with pytest.raises(
        ConvergenceError, match=r"between t = 0 and t = 1, where it is 5\.09.*expected its sign to chan"
    ):
        ode.until(height, x)
    with pytest.raises(ConvergenceError, match="direction=0"):
        NeuralODE(Fall(), horizon=5.0).until(height, x, direction=1)


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 20, 21])
def test_an_event_within_a_coarse_step(steps):
    """Where dg/dt at the end is far from what a longer step changes; Euler's points lie on straight lines."""
    h, before, time = 5.0 / steps, 1.0, 0.0
    while before - h * before > 0.5:
        before, time = before - h * before, time + h
    for method, exact in (("euler", time + 1 - 0.5 / before), ("bosh3", None), ("kutta3", None)):
        ode = NeuralODE(Plain(lambda t, x: -x), horizon=5.0, method=method, steps=steps)
        found, end = ode.until(lambda t, x: x[0] - 0.5, torch.ones(1, dtype=torch.float64))
        assert float(end) == pytest.approx(0.5, rel=1e-14)
        if exact is not None:
            assert float(found) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    ("method", "steps"), [("euler", 8), ("midpoint", 6), ("bosh3", 2), ("dopri5", 1), ("kvaerno5", 2)]
)
@pytest.mark.parametrize("adjoint", ["discrete", "backprop"])
def test_gradients_are_those_of_the_steps_taken_however_coarse(method, steps, adjoint):
    field, x = Tanh(), start(2, 3).requires_grad_()
    ode = NeuralODE(field, horizon=3.0, method=method, steps=steps, adjoint=adjoint)

    def value():
        time, end = ode.until(lambda t, x: x.mean() + 0.2 * t**2 - threshold, x)
        return 2 * time.sin() + end.square().sum()

    threshold = torch.tensor(x.mean().item() + 0.5, dtype=torch.float64, requires_grad=True)
    wanted = [x, threshold, field.inner.weight]
    directions = [torch.randn_like(tensor) for tensor in wanted]
    found = sum(float((g * d).sum()) for g, d in zip(torch.autograd.grad(value(), wanted), directions, strict=True))
    eps, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor += sign * eps * direction
            ends.append(value().item())
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-7)


def test_wrong_events_are_named():
    ode, x = NeuralODE(Fall(), horizon=5.0), torch.tensor([10.0, 0.0], dtype=torch.float64)
    with pytest.raises(
        ProblemError,
        match=r"returned a tensor of shape \(2,\), torch.float64; expected one real number.*reduce over them",
    ):
        ode.until(lambda t, x: x, x)
    with pytest.raises(ProblemError, match="the event returned float; expected one real number as a tensor"):
        ode.until(lambda t, x: 1.0, x)
    with pytest.raises(ProblemError, match=r"returned a tensor of shape \(\), torch.bool; expected one real number"):
        ode.until(lambda t, x: x[0] < 0, x)
    with pytest.raises(ProblemError, match="no derivative in t and x; expected torch operations"):
        ode.until(lambda t, x: torch.tensor(x[0].item()), x)
    with pytest.raises(ProblemError, match=r"does not change along the path at t = 1.*expected a crossing"):
        ode.until(lambda t, x: torch.sign(x[0] - 5.0), x)
    with pytest.raises(NonFiniteError, match="the event is nan at t = 0; expected a finite number"):
        ode.until(lambda t, x: x[0] * torch.nan, x)
    with pytest.raises(ProblemError, match="direction is 2; expected 1"):
        ode.until(height, x, direction=2)
    with pytest.raises(ConvergenceError, match="was not met to rounding.*expected a smooth event"):
        ode.until(lambda t, x: torch.where(x[0] > 5.0, 1.0 + 1e-9 * x[0], -1.0 + 1e-9 * x[0]), x)
    pytest.importorskip("torchdiffeq")
    with pytest.raises(ProblemError, match="until.. met method='heun3' of torchdiffeq; expected one of"):
        NeuralODE(Fall(), method="heun3").until(height, x)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
def test_transformations_are_refused(adjoint):
    ode, x = NeuralODE(Fall(), horizon=5.0, adjoint=adjoint), torch.tensor([10.0, 0.0], dtype=torch.float64)
    refused = r"met NeuralODE.until\(\), .* expected plain tensors: torch.autograd.grad or backward\(\)"

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.ode = ode

        def forward(self, x, event=height):
            return self.ode.until(event, x)[0]

    time = Time()
    for transformed in (lambda x: torch.func.jvp(time, (x,), (x,)), torch.func.grad(time), torch.func.jacfwd(time)):
        with pytest.raises(ProblemError, match=refused):
            transformed(x)
    with pytest.raises(ProblemError, match=refused):
        torch.func.vmap(time)(torch.stack([x, x]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        moved = {"ode.field.g": forward_ad.make_dual(ode.field.g, x[0])}
        for is_enabled in (True, False):
            with torch.set_grad_enabled(is_enabled):
                with pytest.raises(ProblemError, match=refused):
                    time(dual)
                with pytest.raises(ProblemError, match=refused):
                    torch.func.functional_call(time, moved, (x,))
                with pytest.raises(ProblemError, match=refused):
                    time(x, lambda t, x: x[0] - 0.1 * dual[0])
                assert time(x).item() == pytest.approx(math.sqrt(20 / G))  # without tangents it goes on


def test_a_second_derivative_is_refused():
    x = torch.tensor([10.0, 0.0], dtype=torch.float64, requires_grad=True)
    time, _ = NeuralODE(Fall(), horizon=5.0, adjoint="backprop").until(height, x)
    (gradient,) = torch.autograd.grad(time, x, create_graph=True)
    with pytest.raises(OcnoptError, match="the time of an event with any adjoint, give first derivatives only"):
        (gradient.sum() + x.square().sum()).backward()
