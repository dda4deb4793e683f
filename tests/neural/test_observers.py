"""Observers see every evaluation that makes the gradient, with weights that integrate over time."""

from contextlib import contextmanager

import pytest
import torch

from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import Horizon
from tests.neural.cases import Coupled, Tanh, loss, start

METHODS = [(name, 12) for name in sorted(TABLEAUS.keys() - {"adaptive_heun", "tsit5", "dopri8"})] + [
    (name, None) for name in ("bosh3", "dopri5", "tsit5", "dopri8")
]


class Collector:
    """Collects the input of one layer and the gradient at its output, as a second-order optimiser does."""

    def __init__(self, layer):
        self.layer, self.seen, self.ends, self.inside, self.weights = layer, [], [], 0, None
        layer.register_forward_hook(self.hook)

    @contextmanager
    def stage(self, input_weight, gradient_weight):
        assert self.weights is None
        self.weights, self.inside = (input_weight, gradient_weight), 0
        count = len(self.seen)
        yield
        # One evaluation; its gradient arrives with the pull of the whole step, after the context has closed.
        assert self.inside == 1
        assert len(self.seen) == count
        self.weights = None

    def hook(self, layer, inputs, output):
        if self.weights is None:
            return
        self.inside += 1
        assert output.requires_grad
        weights, z = self.weights, inputs[0].detach()
        output.register_hook(lambda g: self.seen.append((weights, z, g)))

    def terminal(self, x, slope, costate):
        self.ends.append((x, slope, costate))


@pytest.mark.parametrize(("method", "steps"), METHODS)
@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize(("horizon", "times"), [(1.5, None), (Horizon(1.0, -0.5), None), (1.5, [0.5, 1.5])])
def test_weights_integrate(method, steps, adjoint, horizon, times):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, horizon, method=method, steps=steps, rtol=1e-8, atol=1e-8, adjoint=adjoint)
    collector = Collector(field.inner)
    handle = ode.observe(collector)
    loss(ode(x, times)).backward()
    handle.remove()
    weights = [w for (w, _), _, _ in collector.seen]
    assert min(weights) >= 0.0
    assert sum(weights) == pytest.approx(1.5, abs=1e-12)
    # Inputs and output gradients, so weighted, make up the gradient of the layer.
    total = sum(factor * g.mT @ z for (_, factor), z, g in collector.seen)
    expected = field.inner.weight.grad
    close = {"rtol": 1e-11, "atol": 1e-13}
    if adjoint == "continuous":
        close = {"rtol": 0.2, "atol": 0.3} if method == "euler" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(total, expected, **close)
    assert len(collector.ends) == 1


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_the_end_is_told_once(method, adjoint):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, 1.5, method=method, adjoint=adjoint)
    collector = Collector(field.inner)
    ode.observe(collector)
    y = ode(x)
    (costate,) = torch.autograd.grad(loss(y), y, retain_graph=True)
    end = y.detach().clone()
    y.data.zero_()  # whatever the caller does with the output
    y.backward(costate)
    ((seen, slope, told),) = collector.ends
    assert torch.equal(seen, end)
    assert torch.equal(told, costate)
    torch.testing.assert_close(slope, field(torch.tensor(1.5, dtype=torch.float64), end).detach(), rtol=1e-12, atol=0)
    assert not seen.requires_grad
    assert not slope.requires_grad


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize("times", [[0.3, 0.7], [0.5, 2.0], [1.5, 0.5]])
def test_nothing_is_told_of_an_end_that_is_not_the_horizon_s(times, adjoint):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, 1.5, adjoint=adjoint)
    collector = Collector(field.inner)
    ode.observe(collector)
    loss(ode(x, times)).backward()
    assert collector.seen
    assert not collector.ends


def test_samples_stay_along_the_leading_axis_of_a_tuple():
    field, x = Coupled(), (start(4, 2), start(4, 2, 3), start(4))
    ode = NeuralODE(field)
    collector = Collector(field.net.inner)
    ode.observe(collector)
    loss(ode(x)).backward()
    assert {tuple(part.shape) for part in collector.ends[0]} == {(4, 2 + 6 + 1)}


def test_the_discrete_adjoint_evaluates_no_more_when_observed_than_in_a_replay():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, checkpoint_bytes=4 * x.nbytes)
    loss(ode(x)).backward()
    plain = ode.statistics
    assert plain.steps <= 4
    ode.observe(Collector(field.inner))
    loss(ode(x)).backward()
    assert ode.statistics == plain
    assert ode.statistics.backward == 6 * ode.statistics.steps


def test_the_continuous_gradient_is_the_same_bit_for_bit_when_observed():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, adjoint="continuous", rtol=1e-6, atol=1e-6)
    parameters = [*field.parameters()]
    plain = torch.autograd.grad(loss(ode(x)), parameters)
    handle = ode.observe(Collector(field.inner))
    observed = torch.autograd.grad(loss(ode(x)), parameters)
    handle.remove()
    for ours, right in zip(observed, plain, strict=True):
        assert torch.equal(ours, right)


def test_several_observers_and_the_passes_they_watch():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field)
    one, two = Collector(field.inner), Collector(field.outer)
    first = ode.observe(one)
    before = ode(x)
    ode.observe(two)
    after = ode(x)
    first.remove()
    neither = NeuralODE(field)(x)
    loss(before).backward()
    assert (len(one.ends), len(two.ends)) == (1, 0)
    loss(after).backward()
    assert (len(one.ends), len(two.ends)) == (2, 1)
    assert len(one.seen) == 2 * len(two.seen)
    loss(neither).backward()
    loss(ode(x)).backward()
    assert (len(one.ends), len(two.ends)) == (2, 2)
