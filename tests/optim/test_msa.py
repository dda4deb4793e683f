"""The extended method of successive approximations against dense solutions."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.msa import MSA

pytestmark = pytest.mark.usefixtures("float64")


def net(*, wide=6):
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, wide), nn.Tanh()),
        nn.Sequential(nn.Linear(wide, wide), nn.Tanh()),
        nn.Linear(wide, 2),
    )


def data(count=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator)


def closure(chain, x, y, *, reduction="mean"):
    def evaluate():
        squares = (chain(x) - y).square().sum(1) / 2
        loss = squares.mean() if reduction == "mean" else squares.sum()
        loss.backward()
        return loss

    return evaluate


def dense(layer, x, costate, *, rho, gamma, samples, first):
    """The minimum over W (bias folded in) of what an affine layer minimises, a quadratic, by its Hessian."""
    old = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    z = torch.cat([x, torch.ones(len(x), 1)], 1)

    def value(w):
        W = w.reshape(old.shape)
        move = z @ (W - old).T
        total = (costate * move).sum() + rho / (2 * samples) * move.square().sum() + gamma / 2 * W.square().sum()
        back = costate @ (W - old)[:, :-1]
        return total if first else total + rho * samples / 2 * back.square().sum()

    zero = torch.zeros(old.numel())
    hessian, slope = torch.func.hessian(value)(zero), torch.func.grad(value)(zero)
    return torch.linalg.solve(hessian, -slope).reshape(old.shape)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("rho", [0.3, 5.0])
def test_affine_layers_take_the_dense_minimum(rho, gamma, reduction):
    chain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    x, y = data()
    states = [x]
    for layer in chain:
        states.append(layer(states[-1]))
        states[-1].retain_grad()
    squares = (states[-1] - y).square().sum(1) / 2
    (squares.mean() if reduction == "mean" else squares.sum()).backward()
    samples = len(x) if reduction == "mean" else 1
    expected = [
        dense(layer, states[t].detach(), states[t + 1].grad, rho=rho, gamma=gamma, samples=samples, first=t == 0)
        for t, layer in enumerate(chain)
    ]
    optimizer = MSA(chain, rho=rho, weight_decay=gamma, iterations=200, reduction=reduction)
    optimizer.step(closure(chain, x, y, reduction=reduction))
    for layer, W in zip(chain, expected, strict=True):
        torch.testing.assert_close(layer.weight, W[:, :-1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.bias, W[:, -1], rtol=1e-6, atol=1e-6)


class Control(nn.Module):
    """x_{t+1} = A x_t + u_t for all samples."""

    def __init__(self, A):
        super().__init__()
        self.register_buffer("A", A)
        self.u = nn.Parameter(torch.zeros(len(A)))

    def forward(self, x):
        return x @ self.A.T + self.u


def test_successive_approximations_solve_a_linear_quadratic_problem():
    """Cost (1/2) |x_N - target|^2 + (gamma/2) sum |u|^2, by the normal equations in all controls."""
    n, count, gamma = 2, 4, 0.3
    A = torch.tensor([[1.0, 0.3], [-0.2, 0.9]])
    chain = nn.Sequential(*(Control(A) for _ in range(count)))
    x, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.5]])
    optimizer = MSA(chain, rho=6.0, weight_decay=gamma)
    losses = []
    for _ in range(40):

        def evaluate():
            loss = (chain(x) - target).square().sum() / 2
            loss.backward()
            return loss

        decay = gamma / 2 * sum(layer.u.detach().square().sum() for layer in chain)
        losses.append((optimizer.step(evaluate) + decay).item())
    J = torch.cat([torch.linalg.matrix_power(A, count - 1 - t) for t in range(count)], 1)
    miss = x[0] @ torch.linalg.matrix_power(A, count).T - target[0]
    u = torch.linalg.solve(J.T @ J + gamma * torch.eye(n * count), -J.T @ miss)
    torch.testing.assert_close(torch.cat([layer.u.detach() for layer in chain]), u, rtol=1e-6, atol=1e-7)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_for_a_large_rho_the_slope_is_that_of_the_loss(reduction):
    """Every layer descends, <gradient, step> < 0, and steps shrink like 1/rho."""
    x, y = data(60)
    steps = []
    for rho in (1e3, 2e3):
        torch.manual_seed(0)
        chain = net()
        before = copy.deepcopy(chain.state_dict())
        MSA(chain, rho=rho, iterations=50, reduction=reduction).step(closure(chain, x, y, reduction=reduction))
        steps.append([p.detach() - before[name] for name, p in chain.named_parameters()])
        assert all((p.grad * s).sum() < 0 for p, s in zip(chain.parameters(), steps[-1], strict=True))
    for one, two in zip(*steps, strict=True):
        assert 0.4 < two.norm() / one.norm() < 0.6


def test_a_nonlinear_chain_learns():
    chain, (x, y) = net(), data()
    optimizer = MSA(chain, rho=3.0)
    losses = [optimizer.step(closure(chain, x, y)).item() for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_options_belong_to_layers():
    chain, (x, y) = net(), data()
    optimizer = MSA(chain, rho=2.0)
    assert [group["layer"] for group in optimizer.param_groups] == ["0", "1", "2"]
    optimizer.param_groups[1]["rho"] = 1e12
    weights = chain[0][0].weight, chain[1][0].weight, chain[2].weight
    before = [weight.detach().clone() for weight in weights]
    optimizer.step(closure(chain, x, y))
    first, second, third = (float((w.detach() - old).norm()) for w, old in zip(weights, before, strict=True))
    assert second < 1e-9 < 1e-3 < min(first, third)


def test_frozen_parameters_and_layers_stay():
    chain, (x, y) = net(), data()
    chain[0].requires_grad_(False)
    chain[2].bias.requires_grad_(False)
    before = copy.deepcopy(chain.state_dict())
    MSA(chain).step(closure(chain, x, y))
    same = {name for name, value in chain.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"0.0.weight", "0.0.bias", "2.bias"}


def test_layers_that_keep_statistics_or_work_in_place():
    """Trying parameters leaves no trace in buffers; the first pass does."""
    chain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = data()
    other = copy.deepcopy(chain)
    optimizer = MSA(chain)
    optimizer.step(closure(chain, x, y))
    closure(other, x, y)()
    torch.testing.assert_close(chain[2].running_mean, other[2].running_mean)
    assert chain[2].num_batches_tracked == 1


def test_a_head_on_integers():
    """A first layer on indices has no costate behind it."""
    chain = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    x, y = torch.tensor([0, 1, 4, 1]), torch.randn(4, 2)
    optimizer = MSA(chain, rho=2.0)
    losses = [optimizer.step(closure(chain, x, y)).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
def test_copies_and_states_go_on_bit_for_bit(duplicate):
    chain, (x, y) = net(), data()
    optimizer = MSA(chain, rho=3.0)
    optimizer.step(closure(chain, x, y))
    chain_too, optimizer_too = duplicate((chain, optimizer))
    third = copy.deepcopy(chain)
    resumed = MSA(third)
    resumed.load_state_dict(optimizer.state_dict())
    for c, o in ((chain, optimizer), (chain_too, optimizer_too), (third, resumed)):
        for _ in range(2):
            o.step(closure(c, x, y))
    for a, b, c in zip(*(m.state_dict().values() for m in (chain, chain_too, third)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_no_hooks_stay():
    chain, (x, y) = net(), data()
    MSA(chain).step(closure(chain, x, y))
    assert not any(module._forward_hooks for module in chain.modules())


tied = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (nn.Linear(2, 2), "chain is Linear; expected an nn.Sequential, whose children are the layers"),
        ([nn.Linear(2, 2)], "chain is list; expected an nn.Sequential"),
        (
            nn.Sequential(tied, nn.Tanh(), tied),
            "the layers '0', '2' share parameters; expected parameters of their own",
        ),
        (nn.Sequential(nn.Tanh()), "has no trainable parameter"),
    ],
)
def test_other_models_are_refused(chain, message):
    with pytest.raises(ProblemError, match=message):
        MSA(chain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho of MSA is -1.0; expected a number >= 0"),
        ({"iterations": 0}, "iterations of MSA is 0; expected a whole number of at least 1"),
        ({"iterations": 2.5}, "iterations of MSA is 2.5; expected a"),
        ({"reduction": "meen"}, "reduction of MSA is 'meen'; expected 'mean' or 'sum'; did you mean 'mean'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        MSA(net(), **options)


def test_another_group_is_refused():
    optimizer = MSA(net())
    with pytest.raises(ProblemError, match="a group of parameters after it was made; expected the layers of its chain"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 3


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def refused(chain, evaluate, message, error=ProblemError):
    before = copy.deepcopy(chain.state_dict())
    with pytest.raises(error, match=message):
        MSA(chain).step(evaluate)
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())


def test_a_chain_whose_layers_have_changed_is_refused():
    chain, (x, y) = net(), data()
    optimizer = MSA(chain)
    optimizer.step(closure(chain, x, y))
    last = chain[2]
    chain.append(nn.Tanh())  # nothing of it is trained
    optimizer.step(closure(chain, x, y))
    chain.append(nn.Linear(2, 2))
    with pytest.raises(ProblemError, match="layers '4' of the chain came, went or were replaced .*; expected those of"):
        optimizer.step(closure(chain, x, y))
    del chain[4]
    chain[2] = copy.deepcopy(last)
    with pytest.raises(ProblemError, match="layers '2' of the chain came"):
        copy.deepcopy(optimizer).step(closure(chain, x, y))
    chain[2] = last
    optimizer.step(closure(chain, x, y))


def test_closures_that_do_not_run_the_chain_once_are_refused():
    chain, (x, y) = net(), data()
    once = closure(chain, x, y)
    refused(chain, None, "without a closure; expected one that runs the chain")
    refused(chain, lambda: 0.0, "ran layer '0' 0 times forward and 0 times backward; expected once each")
    refused(chain, lambda: chain(x).sum(), "1 times forward and 0 times backward")
    refused(chain, lambda: once() + once(), "2 times forward and 2 times backward")


def test_losses_that_read_the_weights_are_refused():
    chain, (x, y) = net(), data()

    def evaluate():
        loss = (chain(x) - y).square().mean() + chain[1][0].weight.square().sum()
        loss.backward()
        return loss

    refused(chain, evaluate, r"gradient of '0.weight' in layer '1' is .* through the chain; expected .*weight_decay=")


def test_layers_that_cannot_be_walked_are_refused():
    x, y = data()
    dropout = nn.Sequential(nn.Linear(3, 9), nn.Sequential(nn.Dropout(0.5), nn.Linear(9, 2)))
    refused(
        dropout, closure(dropout, x, y), "layer '1' returns other values when it is evaluated again.*dropout into eval"
    )
    chain = nn.Sequential(nn.Linear(3, 3), Pair(3, 2))
    refused(chain, closure(lambda x: chain(x)[0], x, y), "layer '1' of the chain takes or returns something else")


def test_what_is_not_finite_changes_nothing():
    chain, (x, y) = net(), data()
    refused(chain, closure(chain, x * torch.nan, y), "the input of layer '0' holds NaN or infinity", NonFiniteError)
    refused(chain, closure(chain, x, y * torch.inf), "the costate of layer '0' holds NaN or inf", NonFiniteError)


def test_convolutions_whose_gradients_lie_apart_in_memory():
    chain = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    ).to(memory_format=torch.channels_last)
    x, y = torch.randn(6, 1, 4, 4), torch.randn(6, 2)
    optimizer = MSA(chain, rho=5.0)
    losses = [optimizer.step(closure(chain, x, y)).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
