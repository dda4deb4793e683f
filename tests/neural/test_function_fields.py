"""Functions, methods and closures as fields."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.snopt import SNOpt
from tests.neural.cases import distance, gradients, loss, start

WAYS = [{}, {"checkpoint_bytes": 0}, {"adjoint": "continuous"}, {"adjoint": "backprop"}, {"error_norm": "sample"}]


class Written(nn.Module):
    """The field of the tests as a module."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, t, x):
        return torch.tanh(x @ self.weight + t * self.bias)


def parts():
    return nn.Parameter(start(3, 3)), start(3).requires_grad_()


@pytest.mark.parametrize("options", WAYS)
def test_a_closure_is_trained_where_its_tensors_live(options):
    weight, bias = parts()
    x = start(4, 3)
    ode = NeuralODE(
        lambda t, x: torch.tanh(x @ weight + t * bias), parameters={"weight": weight, "bias": bias}, **options
    )
    assert {name: id(p) for name, p in ode.named_parameters()} == {"field.weight": id(weight), "field.bias": id(bias)}
    _, found = gradients(ode, x)
    written = NeuralODE(Written(weight, nn.Parameter(bias.detach())), **options)
    _, right = gradients(written, x)
    assert distance(found, right) < 1e-12
    before = loss(ode(x))
    optimizer = torch.optim.SGD(ode.parameters(), lr=1e-3)
    before.backward()
    optimizer.step()
    assert loss(ode(x)) < before
    saved = {name: value.clone() for name, value in ode.state_dict().items()}
    with torch.no_grad():
        weight.zero_()
    ode.load_state_dict(saved)
    assert torch.equal(weight, saved["field.weight"])
    single = {name: value.float() for name, value in saved.items()}
    assert not any(ode.load_state_dict(single, assign=True))
    assert torch.equal(weight, single["field.weight"])
    assert {name: id(p) for name, p in ode.named_parameters()} == {"field.weight": id(weight), "field.bias": id(bias)}
    assert ode(x.float()).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"size mismatch for field.weight(.|\n)*Missing|Missing(.|\n)*size mismatch"):
        ode.load_state_dict({"field.weight": torch.zeros(1)}, assign=True)
    ode.float()
    assert weight.dtype == bias.dtype == torch.float32
    assert ode(x.float()).dtype == torch.float32


def test_an_iterable_a_module_or_one_tensor():
    weight, bias = parts()
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, optimised = start(8, 3), []
    for parameters, names in (
        (iter([weight, bias, net]), {"field.0", "field.1", *(f"field.2.{n}" for n, _ in net.named_parameters())}),
        (net, {f"field.0.{n}" for n, _ in net.named_parameters()}),
        (weight, {"field.0"}),
        (net.parameters(), {f"field.{i}" for i in range(4)}),
        ((), set()),
    ):
        ode = NeuralODE(lambda t, x: net(x) * 0 - x, parameters=parameters)
        assert {name for name, _ in ode.named_parameters()} == names
    ode = NeuralODE(lambda t, x: net(x), parameters=net)
    model = nn.Sequential(nn.Linear(3, 3).double(), ode)
    optimizer = SNOpt(model, lr=0.01, curvature="costate")
    for _ in range(6):
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        optimizer.step()
        optimised.append(value.item())
    assert optimised[-1] < optimised[0]


class Owner(nn.Module):
    """Holds what its method depends on, and the solve of that method."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(start(3, 3))
        self.ode = NeuralODE(self.rate, parameters=[self.weight])

    def rate(self, t, x):
        return torch.tanh(x @ self.weight)

    def forward(self, x):
        return self.ode(x)


def test_a_method_is_copied_with_its_module_and_a_closure_is_not_copied():
    owner, x = Owner(), start(2, 3)
    assert [name for name, _ in owner.named_parameters()] == ["weight"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(owner)))  # noqa: S301
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(twin(x), x)
    assert not torch.equal(owner(x), x)
    weight, _ = parts()
    for function in (lambda t, x: x @ weight, functools.partial(lambda weight, t, x: x @ weight, weight)):
        ode = NeuralODE(function, parameters=[weight])
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ProblemError, match="was to be copied or pickled: .* goes on reading the old"):
                copied(ode)
    assert copy.deepcopy(NeuralODE(torch.mul))(torch.ones(2)).shape == (2,)


def test_exchanged_parameters_are_refused_and_those_of_modules_are_seen():
    weight, _ = parts()
    ode, x = NeuralODE(lambda t, x: x @ weight, parameters=[weight]), start(2, 3)
    with pytest.raises(ProblemError, match=r"were exchanged .*; expected the tensors that it was made with"):
        torch.func.functional_call(ode, {"field.0": torch.zeros(3, 3).double()}, (x,))
    net = nn.Linear(3, 3).double()
    through = NeuralODE(lambda t, x: net(x), parameters=net)
    zero = {name: torch.zeros_like(p) for name, p in through.named_parameters()}
    assert torch.equal(torch.func.functional_call(through, zero, (x,)), x)


@pytest.mark.parametrize(
    ("field", "parameters", "match"),
    [
        (nn.Identity(), [torch.ones(1)], "field Identity, a module, .* adjoint_params="),
        (3, None, "field is int; expected an nn.Module or a function"),
        (nn.Identity, None, "field is the class Identity"),
        (lambda x: x, None, r"the field takes \(x\); expected field\(t, x\), with the time first"),
        (torch.mul, [3.0], "parameters holds float; expected tensors"),
        (torch.mul, 3.0, "parameters holds float"),
        (torch.mul, {"a.b": torch.ones(1, requires_grad=True)}, "name 'a.b'; expected non-empty strings without dots"),
        (torch.mul, [torch.ones(1)], "does not require gradients; expected tensors to be trained"),
        (torch.mul, [torch.ones(1, requires_grad=True) * 2], "was made by MulBackward0, .* adjoint_params=lambda"),
    ],
)
def test_what_does_not_fit(field, parameters, match):
    with pytest.raises(ProblemError, match=match):
        NeuralODE(field, parameters=parameters)


def test_a_tensor_that_was_left_out_is_named_as_such():
    weight, _ = parts()
    with pytest.raises(ProblemError, match=r"parameters=\[...\] for a function as field"):
        NeuralODE(lambda t, x: x @ weight)(start(2, 3))
