"""Torch's own transformations around the module: torch.func, forward mode, batched gradients, checkpoints."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from tests.neural.cases import Plain, Tanh, start

WAYS = [{}, {"checkpoint_bytes": 0}, {"adjoint": "continuous"}, {"adjoint": "backprop"}]
NODES = WAYS[1:3]
REFUSED = 'met a NeuralODE whose backward pass is a solve of its own: .* raise checkpoint_bytes, or use adjoint="back'


def test_torch_func_differentiates_where_the_graph_fits():
    field, x = Tanh(), start(4, 3)
    found = []
    for adjoint in ("discrete", "backprop"):
        ode = NeuralODE(field, adjoint=adjoint)
        own = dict(ode.named_parameters())
        found.append(torch.func.grad(lambda x: torch.sin(ode(x)).sum())(x))  # noqa: B023
        by_parameter = torch.func.grad(lambda p: torch.func.functional_call(ode, p, (x,)).square().sum())  # noqa: B023
        found.append(torch.cat([part.flatten() for part in by_parameter(own).values()]))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def pushed(ode, x, v):
    """The tangent, by torch.func."""
    return torch.func.jvp(ode, (x,), (v,))[1]


def dual(ode, x, v):
    """The tangent, by forward_ad."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(ode(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("tangent", [pushed, dual])
@pytest.mark.parametrize("options", WAYS)
def test_forward_mode_meets_reverse_mode(tangent, options):
    field, x, v, c = Tanh(), start(4, 3), start(4, 3), start(4, 3)
    ode = NeuralODE(field, method="rk4", steps=4, **options)
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((ode(inputs) * c).sum(), inputs)
    right = (gradient * v).sum()
    close = {"rtol": 1e-12, "atol": 0} if options.get("adjoint") != "continuous" else {"rtol": 1e-2, "atol": 0}
    torch.testing.assert_close((tangent(ode, x, v) * c).sum(), right, **close)
    with torch.no_grad():
        torch.testing.assert_close((tangent(ode, x, v) * c).sum(), right, **close)
    field.requires_grad_(False)
    torch.testing.assert_close((tangent(ode, x, v) * c).sum(), right, **close)


def test_tangents_of_parameters_without_gradients():
    ode, x = NeuralODE(Tanh(), method="rk4", steps=4), start(4, 3)
    own = {name: p.detach() for name, p in ode.named_parameters()}

    def end(p):
        return torch.func.functional_call(ode, p, (x,))

    with torch.no_grad():
        _, tangent = torch.func.jvp(end, (own,), (own,))
        up, down = (end({name: p * (1 + h) for name, p in own.items()}) for h in (1e-5, -1e-5))
    torch.testing.assert_close(tangent, (up - down) / 2e-5, rtol=1e-7, atol=1e-9)


def test_what_forward_mode_would_lose_is_refused():
    ode, x, v = NeuralODE(Tanh(), FreeHorizon(1.0, 0.1, 2.0)), start(4, 3), start(4, 3)
    times, T = torch.tensor([0.5, 1.0]).double(), torch.tensor(1.0).double()
    moving = times.clone().requires_grad_()
    with pytest.raises(ProblemError, match="times of the solve carry a tangent .*; expected plain numbers"):
        torch.func.jvp(lambda times: ode(x, times), (times,), (times,))
    with pytest.raises(ProblemError, match="times of the solve carry a tangent"):
        torch.func.jvp(lambda T: torch.func.functional_call(ode, {"T": T}, (x,)), (T,), (T,))
    with pytest.raises(ProblemError, match='met adjoint="backprop" or forward mode, whose steps are plain numbers'):
        pushed(lambda x: ode(x, moving), x, v)

    class Watcher:
        def stage(self, input_weight, gradient_weight):
            raise AssertionError

        def terminal(self, x, slope, costate):
            raise AssertionError

    handle = ode.observe(Watcher())
    with pytest.raises(ProblemError, match=r"forward-mode .* another observer watches; .* within torch.no_grad\(\)"):
        pushed(ode, x, v)
    with torch.no_grad():
        watched = pushed(ode, x, v)
    handle.remove()
    assert torch.equal(watched, pushed(ode, x, v))


def test_a_field_that_differentiates_inside_does_not_lose_tangents():
    field = Plain(lambda t, x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0])
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        pushed(NeuralODE(field), start(3), start(3))


@pytest.mark.parametrize("options", NODES)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)])
def test_torch_func_around_a_node_is_refused(options, transform):
    ode = NeuralODE(Tanh(), **options)
    with pytest.raises(ProblemError, match=REFUSED):
        transform(lambda x: ode(x).sum())(start(4, 3))


@pytest.mark.parametrize("options", NODES)
def test_batched_gradients_of_a_node_are_refused(options):
    x, cotangents = start(4, 3).requires_grad_(), start(2, 4, 3)
    y = NeuralODE(Tanh(), **options)(x)
    with pytest.raises(ProblemError, match=REFUSED):
        torch.autograd.grad(y, x, cotangents, is_grads_batched=True)
    with forward_ad.dual_level(), pytest.raises(ProblemError, match=REFUSED):
        torch.autograd.grad(y, x, forward_ad.make_dual(cotangents[0], cotangents[1]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", WAYS)
def test_a_checkpoint_around_a_module_that_was_never_called(reentrant, options):
    """The first call weighs a graph, the call in the backward pass does not: both must save the same tensors."""
    field, x = Tanh(), start(4, 3).requires_grad_()
    model = nn.Sequential(nn.Linear(3, 3).double(), NeuralODE(field, **options))
    parameters = [x, *model.parameters()]
    for p in parameters:
        p.grad = None
    checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
    expected = torch.autograd.grad(model(x).sin().sum(), parameters)
    for p, right in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, right)


@pytest.mark.parametrize("options", [*WAYS, {"steps": 4}, {"error_norm": "sample"}])
def test_vmap_over_states_or_parameters_is_refused(options):
    ode, x = NeuralODE(Tanh(), **options), start(4, 3)
    several = {name: torch.stack([p, p]).detach() for name, p in ode.named_parameters()}
    with pytest.raises(ProblemError, match="torch.func.vmap met a NeuralODE, .* leading axes of the state are samples"):
        torch.func.vmap(ode)(x)
    with pytest.raises(ProblemError, match="torch.func.vmap met"), torch.no_grad():
        torch.func.vmap(torch.func.jacfwd(ode))(x)
    with pytest.raises(ProblemError, match="parameters of their own go one by one"):
        torch.func.vmap(lambda p: torch.func.functional_call(ode, p, (x,)))(several)


@pytest.mark.parametrize("adjoint", ["discrete", "backprop"])
def test_what_looks_into_an_implicit_step_is_refused(adjoint):
    ode, x, v = NeuralODE(Tanh(), method="kvaerno5", steps=2, adjoint=adjoint), start(4, 3), start(4, 3)
    refused = "met method='kvaerno5': its stages are solved for by iterations, .*; expected torch.autograd.grad,"
    func = torch.func
    for transform in (func.grad, func.jacrev, func.jacfwd, func.hessian, lambda f: lambda x: func.jvp(f, (x,), (v,))):
        with pytest.raises(ProblemError, match=refused):
            transform(lambda x: ode(x).sum())(x)
    with pytest.raises(ProblemError, match="torch.func.vmap met a NeuralODE"):
        torch.func.vmap(torch.func.grad(lambda x: ode(x).sum()))(x)
    with torch.no_grad(), pytest.raises(ProblemError, match=refused):
        dual(ode, x, v)
    inputs, c = x.clone().requires_grad_(), start(4, 3)
    (gradient,) = torch.autograd.grad((ode(inputs) * c).sum(), inputs)
    torch.testing.assert_close((dual(ode, x, v) * c).sum(), (gradient * v).sum(), rtol=1e-11, atol=1e-13)


def test_hessians_by_torch_func():
    ode, x = NeuralODE(Tanh(), steps=3), start(1, 3)
    found = torch.func.hessian(lambda x: ode(x).sin().sum())(x)
    right = torch.autograd.functional.hessian(lambda x: ode(x).sin().sum(), x)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
