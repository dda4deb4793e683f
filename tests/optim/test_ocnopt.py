"""OCNOpt on whole networks against dense matrices, DDP and explicit augmentation of the state."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ocnopt as oc
from ocnopt.differential.sweep import BellmanStep, CostToGo, bellman_step, sweep, sweep_path
from ocnopt.linearise import expand_path, expand_terminal
from ocnopt.optim.game import GAMES
from ocnopt.paths import Widened, walk
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature")

LR = 0.3


def linear_net(seed: int, *sizes: int, act: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    found: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        found += [nn.Linear(i, o), *([act()] if act else [])]
    return nn.Sequential(*(found[:-1] if act else found)).double()


def flat(model: nn.Module, grad: bool = False) -> Tensor:
    return torch.cat([(p.grad if grad else p.detach()).reshape(-1) for p in model.parameters()])


def step(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], lr: float = LR, **options: Any) -> Tensor:
    """The change of all parameters in one step."""
    optimizer, before = oc.OCNOpt(model, lr, limit=1e9, **options), flat(model)
    loss(model(x)).backward()
    optimizer.step()
    return flat(model) - before


def outputs_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """d outputs / d parameters ``(B, out, q)``."""
    named = dict(model.named_parameters())

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,))

    found = torch.func.jacrev(outputs)({name: p.detach() for name, p in named.items()})
    return torch.cat([found[name].flatten(2) for name in named], -1)


def gauss_newton(J: Tensor, p: Tensor, H: Tensor) -> Tensor:
    """-(I / lr + mean_i J_i^T H_i J_i)^-1 mean_i J_i^T p_i."""
    gradient = torch.einsum("boq,bo->q", J, p) / len(J)
    curvature = torch.einsum("boq,bop,bpr->qr", J, H, J) / len(J)
    return -torch.linalg.solve(torch.eye(J.shape[-1], dtype=J.dtype) / LR + curvature, gradient)


@pytest.mark.parametrize("form", ["batch", "gauss_newton"])
def test_one_sweep_of_a_linear_network_with_quadratic_loss_is_the_dense_gauss_newton_step(form: str) -> None:
    model, x, y = linear_net(0, 4, 3, 1), torch.randn(6, 4).double(), torch.randn(6, 1).double()
    J, p = outputs_jacobian(model, x), 2 * (model(x) - y).detach()
    wanted = gauss_newton(J, p, 2 * torch.ones(6, 1, 1, dtype=torch.float64))
    found = step(model, x, lambda out: (out - y).square().mean(), form=form, terminal="squares", scale=0.0)
    assert_close(found, wanted, 1e-8, 1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.03, 1.0])
def test_gauss_newton_of_any_network_in_the_span_of_the_costates(scale: float) -> None:
    model, x = linear_net(1, 4, 5, 5, 3, act=nn.Tanh), torch.randn(7, 4).double()
    y = torch.randint(0, 3, (7,))
    out = model(x).detach().requires_grad_()
    p = torch.autograd.grad(functional.cross_entropy(out, y, reduction="sum"), out)[0]
    shares = out.detach().softmax(1)
    Hp = shares * (p - (shares * p).sum(1, keepdim=True))
    bend = (p * Hp).sum(1) / p.square().sum(1).square() + scale
    H = bend[:, None, None] * p[:, :, None] * p[:, None, :]
    wanted = gauss_newton(outputs_jacobian(model, x), p, H)
    found = step(model, x, lambda out: functional.cross_entropy(out, y), form="gauss_newton", scale=scale)
    assert_close(found, wanted, 1e-8, 1e-12)


def test_the_second_pass_tends_to_gauss_newton_as_steps_get_small() -> None:
    """Of three layers on the feedback sees the products of their steps, which Gauss-Newton leaves out."""
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    errors = []
    for lr in (1e-3, 1e-4):
        found = [
            step(linear_net(2, 4, 5, 5, 1), x, lambda out: (out - y).square().mean(), lr, form=form, terminal="squares")
            for form in ("batch", "gauss_newton")
        ]
        errors.append(float((found[0] - found[1]).norm() / found[1].norm()))
    assert 0 < errors[1] < errors[0] / 50
    assert errors[0] < 1e-3


def test_the_direction_of_ddp_for_one_sample() -> None:
    """A network as a staged problem whose controls are the changes of its weights, at 1/2 |du|^2 / lr each."""
    model = linear_net(3, 3, 4, 4, 2, act=nn.Tanh)
    x, a = torch.randn(1, 3).double(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    shift = 3.0 - float((model(x).detach() @ a).min())
    layers = [m for m in model if isinstance(m, nn.Linear)]
    weights = [torch.cat([m.weight.detach(), m.bias.detach()[:, None]], 1) for m in layers]

    def stage(W: Tensor, last: bool) -> oc.Stage:
        def dynamics(k: Any, x: Tensor, u: Tensor) -> Tensor:
            w = W + u.reshape(*u.shape[:-1], *W.shape)
            h = (w @ torch.cat([x, torch.ones_like(x[..., :1])], -1)[..., None])[..., 0]
            return h if last else torch.tanh(h)

        return oc.Stage(dynamics, lambda k, x, u: u.square().sum(-1) / (2 * LR), W.numel())

    # The published factor is exact for this loss: its Hessian is p p^T.
    staged = oc.StagedOCP(
        [stage(W, i == len(weights) - 1) for i, W in enumerate(weights)],
        lambda x: -((x * a).sum(-1) + shift).log(),
        initial_state=x[0],
    )
    wide = Widened(staged)
    path = walk(wide, lambda k, z: torch.zeros(wide.m).double(), wide.join([x[0]], x[0, :0])[0])
    models, terminal = expand_path(wide, path, exact=False), expand_terminal(wide, path.states[-1])
    direction = sweep_path(wide, path, models, terminal, torch.zeros(()).double())
    found = step(model, x, lambda out: -((out * a).sum(-1) + shift).log().mean(), terminal="gradient", scale=1.0)
    state, parts = path.states[0], found.split([p.numel() for p in model.parameters()])
    for k, layer in enumerate(layers):
        u = direction.k[k] + direction.K[k] @ (state - path.states[k])
        mine = torch.cat([parts[2 * k].view_as(layer.weight), parts[2 * k + 1][:, None]], 1).reshape(-1)
        assert_close(mine, u[: len(mine)], 1e-8, 1e-14)
        group = next(group for group in wide.groups if group.start <= k < group.stop)
        state = wide.advance(group, k, state, u)[0]


class Skips(nn.Module):
    """A residual block with identity or projection, or an inception block, between two layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.skip = nn.Linear(4, 4) if kind in ("projection", "inception") else nn.Identity()
        self.last = nn.Linear(8 if kind == "inception" else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        branch = self.two(self.one(x))
        return self.last(torch.cat([branch, self.skip(x)], 1) if self.kind == "inception" else branch + self.skip(x))


def augmented(model: Skips, x: Tensor, y: Tensor) -> Tensor:
    """The change of all parameters by the Bellman sweep over explicitly augmented states, all samples stacked.

    States: r, (h, r), (h, s), (b, s), joint, out; a step without a layer has a control that does nothing. The gains
    answer to the states that the layers moved before have made.
    """
    W, B, kinds = {name: p.detach().clone() for name, p in model.named_parameters()}, len(x), x.new_zeros
    eye = torch.eye(4, dtype=x.dtype)
    has_skip, concatenates = "skip.weight" in W, model.kind == "inception"
    mix = torch.eye(8, dtype=x.dtype) if concatenates else torch.cat([eye, eye], 1)

    def layer(name: str, z: Tensor) -> Tensor:
        return functional.linear(z, W[f"{name}.weight"], W[f"{name}.bias"])

    def walk(z: Tensor) -> list[Tensor]:
        states = [z, layer("first", z)]
        states.append(torch.cat([layer("one", states[-1]), states[-1]], 1))
        r = states[-1][:, 5:]
        states.append(torch.cat([states[-1][:, :5], layer("skip", r) if has_skip else r], 1))
        states.append(torch.cat([layer("two", states[-1][:, :5]), states[-1][:, 5:]], 1))
        states.append(states[-1] @ mix.mT)
        return [*states, layer("last", states[-1])]

    old = walk(x)
    maps = [
        W["first.weight"],
        torch.cat([W["one.weight"], eye]),
        torch.block_diag(torch.eye(5, dtype=x.dtype), W["skip.weight"] if has_skip else eye),
        torch.block_diag(W["two.weight"], eye),
        mix,
        W["last.weight"],
    ]
    acts = [("first", slice(0, 3), 0), ("one", slice(0, 4), 0), ("skip", slice(5, 9), 5), ("two", slice(0, 5), 0)]
    acts += [("", slice(0, 0), 0), ("last", slice(0, None), 0)]
    links = []
    for (name, read, offset), A, z in zip(acts, maps, old[:-1], strict=True):
        full = torch.cat([z[:, read], torch.ones(B, 1, dtype=x.dtype)], 1)
        width = len(W[f"{name}.bias"]) if f"{name}.bias" in W else 0
        C = kinds(B, len(A), max(1, width), full.shape[1])
        for j in range(width):
            C[:, offset + j, j] = full
        C = C.reshape(B * len(A), -1)
        F = torch.block_diag(torch.ones(1, 1, dtype=x.dtype), torch.cat([torch.block_diag(*[A] * B), C], 1))
        L = torch.block_diag(kinds(len(F.mT) - C.shape[1], len(F.mT) - C.shape[1]), torch.eye(C.shape[1]).to(x) / LR)
        links.append(BellmanStep(F, L, None, None, kinds(C.shape[1], C.shape[1])))
    p = 2 * (old[-1] - y) / y.numel()
    V = torch.block_diag(kinds(1, 1), *[B * torch.outer(row, row) for row in p])
    V[0, 1:] = V[1:, 0] = p.reshape(-1)
    _, gains = sweep(bellman_step, links, CostToGo(V, V[0].clone(), torch.tensor(True)))
    before = {name: value.clone() for name, value in W.items()}
    for k, ((name, _, _), gain) in enumerate(zip(acts, gains, strict=True)):
        if f"{name}.weight" in W:
            u = gain.K[:, 0] + gain.K[:, 1:] @ (walk(x)[k] - old[k]).reshape(-1)
            matrix = u.reshape(len(W[f"{name}.bias"]), -1)
            W[f"{name}.weight"] += matrix[:, :-1]
            W[f"{name}.bias"] += matrix[:, -1]
    return torch.cat([(W[name] - before[name]).reshape(-1) for name in W])


@pytest.mark.parametrize("kind", ["identity", "projection", "inception"])
def test_the_sweep_over_a_graph_is_that_over_the_augmented_state(kind: str) -> None:
    torch.manual_seed(4)
    model, x, y = Skips(kind).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    wanted = augmented(model, x, y)
    found = step(model, x, lambda out: functional.mse_loss(out, y), terminal="gradient", scale=1.0)
    assert_close(found, wanted, 1e-9, 1e-11)


def test_without_skips_the_graph_is_the_chain() -> None:
    """A model of which branches carry nothing on takes the step of the chain alone."""
    torch.manual_seed(5)
    model, x, y = linear_net(5, 3, 4, 2, act=nn.Tanh), torch.randn(5, 3).double(), torch.randn(5, 2).double()

    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = linear_net(5, 3, 4, 2, act=nn.Tanh)

        def forward(self, x: Tensor) -> Tensor:
            h = self.chain[0](x)
            left, right = h.split([1, 3], 1)
            h = torch.cat([left.tanh(), right.tanh()], 1)
            return self.chain[2](h + 0 * x.sum(1, keepdim=True))

    loss = lambda out: functional.mse_loss(out, y)  # noqa: E731
    assert_close(step(Detour(), x, loss), step(model, x, loss), 1e-10, 1e-13)


@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
@pytest.mark.parametrize(
    ("form", "game"), [*itertools.product(("batch", "sample"), GAMES), ("gauss_newton", "cooperative")]
)
def test_every_form_learns(curvature: str, form: str, game: str) -> None:
    torch.manual_seed(6)
    model, x, y = Skips("inception"), torch.randn(16, 3), torch.randn(16, 2)
    lr = {"identity": 0.1, "adaptive": 0.01, "kronecker": 0.02}[curvature]
    optimizer = oc.OCNOpt(model, lr, curvature=curvature, form=form, game=game)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    v, w = optimizer.answers["two.weight"]
    assert v.shape == w.shape == (16,)
