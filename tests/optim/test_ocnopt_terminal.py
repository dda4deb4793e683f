"""The curvature of the loss at the outputs, by name or recognised, against the Hessian that autograd finds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ocnopt.optim.ocnopt import OCNOpt

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]

LOSSES = {
    "cross_entropy": functional.cross_entropy,
    "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
    "squares": functional.mse_loss,
}
POSITIONS = [(), (4,), (2, 3)]
B = 6


def targets(name, *positions, B=B):
    if name == "cross_entropy":
        return torch.randint(3, (B, *positions))
    return torch.rand(B, 3, *positions).round() if name == "binary_cross_entropy" else torch.randn(B, 3, *positions)


class Head(nn.Module):
    def __init__(self, *positions):
        super().__init__()
        self.inner, self.outer, self.positions = nn.Linear(5, 4), nn.Linear(4, 3), positions
        if positions:
            self.outer = nn.Linear(4, 3 * torch.Size(positions).numel())

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x))).unflatten(1, (3, *self.positions))


def step(model, x, loss, terminal, **options):
    model = copy.deepcopy(model)
    optimizer = OCNOpt(model, 0.7, terminal=terminal, scale=0.1, **options)
    loss(model(x)).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_autograd(loss, factor):
    """Hessian times p of a loss whose samples do not meet, times the samples it is the mean of."""

    def terminal(x, p):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(factor * loss(x), x, create_graph=True)
            return torch.autograd.grad(gradient, x, p)[0]

    return terminal


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "terminal"),
    [*((name, name) for name in LOSSES), ("cross_entropy", "auto"), ("binary_cross_entropy", "auto")],
)
def test_it_is_the_hessian_of_the_loss(name, terminal, reduction, positions):
    y, x, model = targets(name, *positions), torch.randn(B, 5), Head(*positions)
    loss = lambda out: LOSSES[name](out, y, reduction=reduction)  # noqa: E731
    wanted = step(model, x, loss, by_autograd(loss, B if reduction == "mean" else 1), reduction=reduction)
    found = step(model, x, loss, terminal, reduction=reduction)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found, step(model, x, loss, "gradient", reduction=reduction), rtol=1e-6)


def test_soft_targets_are_recognised():
    y, x, model = torch.rand(B, 3).softmax(1), torch.randn(B, 5), Head()
    loss = lambda out: functional.cross_entropy(out, y)  # noqa: E731
    assert torch.equal(step(model, x, loss, "auto"), step(model, x, loss, "cross_entropy"))


def test_small_residuals_are_not_taken_for_targets_of_a_probability():
    x, model = torch.randn(B, 5), Head()
    y = model(x).detach() + 0.1 * torch.randn(B, 3)
    loss = lambda out: functional.mse_loss(out, y)  # noqa: E731
    assert torch.equal(step(model, x, loss, "auto"), step(model, x, loss, "gradient"))


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_coarse_outputs_are_recognised(name):
    """Gradients at bfloat16 outputs are rounded to three digits."""
    y, x, model = targets(name, B=64), torch.randn(64, 5).float(), Head().float()

    def loss(out):
        return LOSSES[name](out.float(), y.float() if y.is_floating_point() else y)

    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = step(model, x, loss, "auto"), step(model, x, loss, name)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, step(model, x, loss, "gradient"))
