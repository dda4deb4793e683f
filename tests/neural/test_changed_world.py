"""Between the forward and the backward pass something that the field depends on changes."""

import copy

import pytest
import torch
from torch import nn

from ocnopt.errors import OcnoptError
from ocnopt.neural.neural_ode import NeuralODE
from tests.neural.cases import Plain, Tanh, distance, start

KEPT_OR_REPLAYED = pytest.mark.parametrize("budget", [2**20, 0])
FOUR_STEPS = {"method": "rk4", "steps": 4}


def backward(y, field):
    return torch.cat([g.flatten() for g in torch.autograd.grad(torch.sin(y + 0.3).sum(), [*field.parameters()])])


@KEPT_OR_REPLAYED
def test_an_attribute(budget):
    net = Tanh()
    field = Plain(lambda t, x: net(t, x) * field.noise)
    field.net, field.noise, x = net, start(4, 3), start(4, 3)
    ode = NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    y = ode(x)
    field.noise = start(4, 3)
    if budget:
        assert distance(backward(y, field), expected) < 1e-12
    else:
        with pytest.raises(OcnoptError, match="field has changed .*: 'noise' is not what it was; .*call backward"):
            backward(y, field)


@KEPT_OR_REPLAYED
def test_adjoint_params_of_equal_values(budget):
    net, x = Tanh(), start(4, 3)
    field = Plain(lambda t, x: net(t, x) * field.scale)
    field.net, scale = net, torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True)
    field.scale = scale
    ode = NeuralODE(field, checkpoint_bytes=budget, adjoint_params=lambda: [field.scale], **FOUR_STEPS)
    expected = torch.autograd.grad(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x).sum(), scale)[0]
    y = ode(x)
    field.scale = scale.detach().clone().requires_grad_()
    if budget:
        torch.testing.assert_close(torch.autograd.grad(y.sum(), scale)[0], expected)
    else:
        with pytest.raises(OcnoptError, match="'scale' is not what it was"):
            torch.autograd.grad(y.sum(), scale)


@KEPT_OR_REPLAYED
def test_batch_statistics_that_moved_on_meanwhile(budget):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    field, x = Plain(lambda t, x: net(x)), start(16, 3)
    field.net = net
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    y = NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)(x)
    net.train()
    net(5 * x)
    now = net[1].running_var.clone()
    if budget:
        # Autograd goes through the graph by itself, and has kept no copy of the statistics.
        with pytest.raises(OcnoptError, match="field has changed .*'net.1.running_var'.* is not what it was"):
            backward(y, field)
    else:
        assert distance(backward(y, field), expected) < 1e-12
    assert torch.equal(net[1].running_var, now)
    assert net[1].training


@KEPT_OR_REPLAYED
def test_a_buffer_edited_behind_autograd(budget):
    net, x = Tanh(), start(4, 3)
    field = Plain(lambda t, x: net(t, x) * field.scale)
    field.net = net
    field.register_buffer("scale", start(3))
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    y = NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)(x)
    field.scale.data += 1.0
    now = field.scale.clone()
    if budget:
        with pytest.raises(OcnoptError, match="field has changed .*: 'scale' is not what it was"):
            backward(y, field)
    else:
        assert distance(backward(y, field), expected) < 1e-12
    assert torch.equal(field.scale, now)


@KEPT_OR_REPLAYED
def test_buffers_that_the_field_moves_by_itself(budget):
    net, x = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double(), start(16, 3)
    field = Plain(lambda t, x: net(x))
    field.net = net
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    y = NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)(x)
    net(5 * x)
    assert distance(backward(y, field), expected) < 1e-12


def test_what_matters_early_alone():
    net, x = Tanh(), start(4, 3)
    field = Plain(lambda t, x: net(t, x) * (field.scale if t < 0.5 else 1.0))
    field.net, field.scale = net, 1.0
    y = NeuralODE(field, checkpoint_bytes=0, method="rk4", steps=20)(x)
    field.scale = 2.0
    with pytest.raises(OcnoptError, match="field has changed .*: 'scale' is not what it was"):
        backward(y, field)


@pytest.mark.parametrize("control", [{"method": "rk4", "steps": 5}, {"rtol": 1e-5, "atol": 1e-5}])
def test_the_continuous_adjoint_sees_it_too(control):
    net, x = Tanh(), start(4, 3)
    field = Plain(lambda t, x: net(t, x) * field.scale)
    field.net, field.scale = net, start(3)
    ode = NeuralODE(field, adjoint="continuous", **control)
    backward(ode(x), field)
    y = ode(x)
    field.scale = start(3)
    with pytest.raises(OcnoptError, match="field has changed .*: 'scale' is not what it was"):
        backward(y, field)


@KEPT_OR_REPLAYED
def test_a_buffer_that_was_exchanged(budget):
    net, x = Tanh(), start(4, 3)
    field = Plain(lambda t, x: net(t, x) * field.scale)
    field.net = net
    field.register_buffer("scale", start(3))
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    y = NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)(x)
    field.scale = start(3)
    if budget:
        assert distance(backward(y, field), expected) < 1e-12
    else:
        with pytest.raises(OcnoptError, match="'scale' is not what it was"):
            backward(y, field)


@pytest.mark.parametrize(("adjoint", "budget"), [("discrete", 0), ("continuous", 0), ("discrete", 2**23)])
def test_a_field_that_is_another_at_every_evaluation(adjoint, budget):
    """Spectral normalisation iterates as it is called: only its graph knows what it was."""
    net, x = torch.nn.utils.spectral_norm(nn.Linear(40, 40).double()), start(4, 40)
    field = Plain(lambda t, x: torch.tanh(net(x)))
    field.net = net
    state = copy.deepcopy(field.state_dict())
    expected = backward(NeuralODE(field, adjoint="backprop", **FOUR_STEPS)(x), field)
    field.load_state_dict(state)
    y = NeuralODE(field, adjoint=adjoint, checkpoint_bytes=budget, **FOUR_STEPS)(x)
    if budget:
        assert distance(backward(y, field), expected) < 1e-12
    else:
        with pytest.raises(OcnoptError, match="field has changed between"):
            backward(y, field)


@pytest.mark.parametrize(
    "options", [{"error_norm": "sample"}, {"adjoint": "continuous"}, {"checkpoint_bytes": 0}, {"adjoint": "backprop"}]
)
def test_parameters_frozen_before_the_backward_pass_get_no_gradient(options):
    ode, x = NeuralODE(Tanh(), **options), start(2, 3).requires_grad_()
    (right,) = torch.autograd.grad(ode(x).sum(), x)
    y, frozen = ode(x).sum(), ode.field.inner.weight
    frozen.register_hook(lambda g: 2 * g)
    frozen.requires_grad_(False)
    y.backward()
    torch.testing.assert_close(x.grad, right)
    assert (frozen.grad, frozen.requires_grad, len(frozen._backward_hooks)) == (None, False, 1)
    assert ode.field.outer.weight.grad is not None
