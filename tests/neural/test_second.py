"""Second derivatives through the discrete adjoint, where no graph is kept."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ocnopt.errors import OcnoptError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from tests.neural.cases import Coupled, Tanh, distance, loss, start

WAYS = [
    {},
    {"checkpoint_bytes": 0},
    {"checkpoint_bytes": 3000},
    {"checkpoint_bytes": 0, "method": "rk4", "steps": 5},
    {"checkpoint_bytes": 0, "method": "dopri8", "dense": True},
    {"error_norm": "sample"},
    {"error_norm": "sample", "method": "bosh3", "checkpoint_bytes": 300},
]
TIMES = [0.0, 0.3, 0.3, 1.0]


def second(ode, x, times, weight):
    """The gradient and a product of its Hessian, in the state, the parameters and what the output is weighed with."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wanted = [x, weight, *ode.parameters()]
    first = torch.autograd.grad(loss(ode(torch.sin(x), times) * weight), wanted, create_graph=True)
    # of every sign, and the same for all ways
    direction = [torch.cos(torch.arange(g.numel(), dtype=g.dtype)).view_as(g) for g in first]
    found = torch.autograd.grad(first, wanted, direction)
    return torch.cat([g.detach().flatten() for g in (*first, *found)])


@pytest.mark.parametrize("times", [None, TIMES])
@pytest.mark.parametrize("options", WAYS)
def test_hessian_products_are_those_of_back_propagation(options, times):
    field, x, weight = Tanh(), start(4, 3), start(4, 3)
    found = second(NeuralODE(field, **options), x, times, weight)
    plain = {name: value for name, value in options.items() if name != "checkpoint_bytes"}
    right = second(NeuralODE(field, adjoint="backprop", **plain), x, times, weight)
    assert distance(found, right) < 1e-11


def test_tuples_noise_and_observers():
    x = (start(2, 2).requires_grad_(), start(2, 2, 2), start(2))
    field = Coupled()
    rows = []
    for adjoint in ("discrete", "backprop"):
        ode = NeuralODE(field, adjoint=adjoint, checkpoint_bytes=0)
        wanted = [x[0], *ode.parameters()]
        first = torch.autograd.grad(loss(ode(x)), wanted, create_graph=True)
        found = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        rows.append(torch.cat([g.flatten() for g in found]))
    assert distance(*rows) < 1e-11

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = Tanh(), nn.Dropout(0.5)

        def forward(self, t, x):
            return self.drop(self.net(t, x))

    noisy, rows = Noisy(), []
    for adjoint in ("discrete", "backprop"):
        torch.manual_seed(3)
        ode = NeuralODE(noisy, method="rk4", steps=3, adjoint=adjoint, checkpoint_bytes=0)
        rows.append(second(ode, torch.ones(4, 3).double(), None, torch.ones(4, 3).double()))
    assert distance(*rows) < 1e-11

    seen = []

    class Watcher:
        def stage(self, input_weight, gradient_weight):
            seen.append(input_weight)
            return torch.enable_grad()

        def terminal(self, x, slope, costate):
            seen.append(costate)

    ode = NeuralODE(field.net, method="rk4", steps=3)
    one, weight = start(4, 2), start(4, 2)
    right = second(ode, one, None, weight)
    handle = ode.observe(Watcher())
    assert distance(second(ode, one, None, weight), right) < 1e-11
    # The gradient's pass, and that of what reaches the output from the second derivative; not the steps with a graph.
    assert len(seen) == 26
    handle.remove()


def test_a_gradient_that_is_not_differentiated_again_costs_nothing_more():
    field, x = Tanh(), start(4, 3).requires_grad_()
    ode = NeuralODE(field, checkpoint_bytes=0)
    spent = []
    for create_graph in (False, True):
        torch.autograd.grad(loss(ode(x)), [x, *ode.parameters()], create_graph=create_graph)
        spent.append(ode.statistics.backward)
    assert spent[0] == spent[1]


def test_a_gradient_penalty_trains():
    field, x = Tanh(), start(4, 3).requires_grad_()
    rows = []
    for options in ({"checkpoint_bytes": 0}, {"adjoint": "backprop"}):
        ode = NeuralODE(field, **options)
        (slope,) = torch.autograd.grad(ode(x).sum(), x, create_graph=True)
        ode.zero_grad()
        slope.square().mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in ode.parameters() if p.grad is not None]))
    assert distance(*rows) < 1e-11


def test_third_derivatives_and_second_ones_of_the_continuous_adjoint_and_of_times_are_refused():
    field, x = Tanh(), start(4, 3).requires_grad_()
    third = pytest.raises(OcnoptError, match='second derivative .* once more; .*two .*: use adjoint="backprop"')
    for options, refused in (({"checkpoint_bytes": 0}, third), ({"adjoint": "backprop"}, nullcontext())):
        (first,) = torch.autograd.grad(loss(NeuralODE(field, **options)(x)), x, create_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        with refused:
            again.sum().backward()
    refused = pytest.raises(OcnoptError, match='once more; .* use adjoint="discrete" with plain times, or "backprop"')
    free = NeuralODE(field, FreeHorizon(1.0, 0.1, 2.0))
    free.T.requires_grad_()
    for ode in (NeuralODE(field, adjoint="continuous"), free):
        # A linear loss: its gradient does not depend on the output, and still must not pass for a constant.
        (first,) = torch.autograd.grad(ode(x).sum(), x, create_graph=True)
        with refused:
            first.sum().backward()


@pytest.mark.parametrize("method", ["heun3", "fehlberg2", "implicit_adams"])
def test_second_derivatives_of_an_adjoint_of_torchdiffeq_are_refused(method):
    pytest.importorskip("torchdiffeq")
    field, x = Tanh(), start(4, 3).requires_grad_()
    y = NeuralODE(field, method=method, adjoint="continuous")(x)
    weight = next(field.parameters())
    (plain,) = torch.autograd.grad(y.square().sum(), weight, retain_graph=True)
    by_x, by_weight = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    torch.testing.assert_close(by_weight, plain, rtol=0, atol=0)
    for gradient in (by_x, by_weight):
        for wanted in (x, weight):
            with pytest.raises(OcnoptError, match="was differentiated once more"):
                torch.autograd.grad(y.mean() + gradient.square().sum(), wanted, retain_graph=True)
