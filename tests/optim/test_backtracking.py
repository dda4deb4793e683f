"""Gradient descent with backtracking: steps known in closed form, scales, the end, messages."""

import math

import pytest
import torch

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.runge_kutta_net import RungeKuttaNet, project_simplex
from ocnopt.optim.backtracking import Backtracking, descend
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.usefixtures("float64")


def test_on_a_quadratic_the_step_is_the_first_that_the_model_allows():
    H, x = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([1.0, -2.0], requires_grad=True)
    before = x.detach().clone()
    found = descend([x], lambda: 0.5 * x @ H @ x, 1)
    # 1/L = 1, 1/2, 1/4: the first with L >= the largest eigenvalue, or lucky in this direction; here 1 and 1/2 fail
    assert_close(x.detach(), before - 0.25 * H @ before, rtol=1e-14)
    assert found.step == pytest.approx(0.25 / 0.9)
    assert found.losses == [float(0.5 * before @ H @ before), float((0.5 * x @ H @ x).detach())]


def test_the_loss_never_rises_and_falls_as_fast_as_promised():
    torch.manual_seed(1)
    H, x = torch.diag(torch.logspace(-1, 1, 6)), torch.randn(6, requires_grad=True)
    found = descend([x], lambda: 0.5 * x @ H @ x, 300)
    pairs = list(zip(found.losses, found.losses[1:], strict=False))
    assert all(after <= before for before, after in pairs)
    assert found.losses[-1] < 1e-6 * found.losses[0]


def test_a_scale_is_a_change_of_units():
    """In y = x / sqrt(s) the steps are those with scale s."""
    x, y = (torch.tensor([value], requires_grad=True) for value in (3.0, 3.0 / 10))
    z, w = (torch.tensor([1.0], requires_grad=True) for _ in range(2))
    loss = lambda x, z: (1 - torch.cos(x / 10) + (x / 10 - z) ** 2).sum()  # noqa: E731
    scaled = descend([x, z], lambda: loss(x, z), 20, scales=[100.0, 1.0])
    plain = descend([y, w], lambda: loss(10 * y, w), 20)
    assert_close(scaled.losses, plain.losses, rtol=1e-10)
    assert_close(x.detach(), 10 * y.detach(), rtol=1e-8)


def test_a_step_on_the_simplex_is_taken_behind_the_projection():
    net, x = RungeKuttaNet(2, 4, step="simplex"), torch.randn(30, 2)
    h = net.step_sizes
    loss = lambda: net(x).square().sum()  # noqa: E731
    (g,) = torch.autograd.grad(loss(), net.sizes)
    for p in (net.weight, net.bias):
        p.requires_grad_(False)
    found = descend(net.parameters(), loss, 1, step=1e-3)
    L = 1 / (0.9 * found.step)
    assert_close(net.step_sizes, project_simplex(h - g / L), rtol=1e-12)


def test_at_a_minimum_nothing_moves():
    x = torch.tensor([0.0, 0.0], requires_grad=True)
    found = descend([x], lambda: 1 + x.abs().sum(), 5)
    assert found.losses[-1] == 1.0
    assert x.tolist() == [0.0, 0.0]
    # no step lowers this one: the gradient points the wrong way
    y = torch.tensor([1.0], requires_grad=True)
    found = descend([y], lambda: (2 * y.detach() - y).sum(), 5)
    assert len(found.losses) == 1
    assert y.item() == 1.0


def test_a_trial_that_is_not_finite_is_refused():
    x = torch.tensor([1.0], requires_grad=True)
    found = descend([x], lambda: (-torch.log(x) + x * 3).sum(), 50, step=10.0)
    assert x.item() == pytest.approx(1 / 3, abs=1e-6)
    assert all(math.isfinite(value) for value in found.losses)


def quadratic(x, curvature):
    return lambda: 0.5 * (curvature * x * x).sum()


def test_steps_of_the_optimiser_are_those_of_the_loop():
    curvature = torch.logspace(-1, 1, 6)
    x, y = (torch.linspace(-1, 2, 6).requires_grad_() for _ in range(2))
    expected = descend([x], quadratic(x, curvature), 40)
    optimizer = Backtracking([y])
    losses = [float(optimizer.step(quadratic(y, curvature))) for _ in range(40)]
    assert_close(losses, expected.losses[:-1], rtol=1e-12)
    assert_close(y.detach(), x.detach(), rtol=1e-10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected.step, rel=1e-12)


def test_where_no_step_lowers_the_loss_the_optimiser_stays_and_keeps_its_rate():
    x = torch.tensor([1.0], requires_grad=True)
    optimizer = Backtracking([x], 0.5)
    optimizer.step(lambda: (2 * x.detach() - x).sum())  # the gradient points the wrong way
    assert (x.item(), optimizer.param_groups[0]["lr"]) == (1.0, 0.5)
    x.requires_grad_(False)
    with pytest.raises(ProblemError, match="the loss has no gradient; expected one that depends on a parameter"):
        optimizer.step(lambda: x.sum())


def test_an_interrupted_search_puts_the_parameters_back():
    x = torch.tensor([1.0], requires_grad=True)

    def closure():
        if not torch.is_grad_enabled():
            raise KeyboardInterrupt
        return x.square().sum()

    with pytest.raises(KeyboardInterrupt):
        Backtracking([x]).step(closure)
    assert x.item() == 1.0


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (None, ProblemError, "without a closure; expected one that computes the loss"),
        (lambda x: x.square(), ProblemError, r"returned a tensor \(2,\) of torch.float64; expected one"),
        (lambda x: 1.0, ProblemError, "the loss has no gradient; expected one that depends on a parameter"),
        (lambda x: torch.log(-x).sum(), NonFiniteError, "the first loss is nan; expected a finite number"),
        (lambda x: ((x - 1).abs() ** 0.5).sum(), NonFiniteError, "gradients of .* hold NaN or infinity"),
    ],
)
def test_closures_of_the_optimiser(closure, error, message):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(error, match=message):
        Backtracking([x]).step(closure and (lambda: closure(x)))
    assert x.tolist() == [1.0, 2.0]


def test_a_closure_that_calls_backward():
    x = torch.tensor([1.0, 2.0], requires_grad=True)

    def closure():
        loss = x.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ProblemError, match="the closure calls backward, which is not its part here"):
        Backtracking([x]).step(closure)
    assert x.tolist() == [1.0, 2.0]


def test_messages():
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(ProblemError, match="iterations is 0; expected a whole number of at least 1"):
        descend([x], lambda: x.sum(), 0)
    with pytest.raises(ProblemError, match="step is 0.0; expected a positive number"):
        descend([x], lambda: x.sum(), 1, step=0.0)
    with pytest.raises(ProblemError, match=r"scales are \[1.0, 2.0\]; expected 1 positive numbers"):
        descend([x], lambda: x.sum(), 1, scales=[1.0, 2.0])
    with pytest.raises(ProblemError, match="no parameter requires gradients; expected one at least"):
        descend([x.detach()], lambda: x.sum(), 1)
    with pytest.raises(NonFiniteError, match="the first loss is nan; expected a finite number"):
        descend([x], lambda: torch.log(-x).sum(), 1)
