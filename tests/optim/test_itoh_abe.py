"""The Itoh-Abe discrete gradient: the loss falls by exactly s^2 / tau, for every tau, without gradients."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.itoh_abe import ItohAbe
from ocnopt.optim.manifolds import RETRACTIONS, polar, retract
from ocnopt.optim.scalar import Equation, solve

pytestmark = pytest.mark.usefixtures("float64")

TAUS = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3]
LOSSES = {
    "quadratic": lambda x: ((torch.arange(4) + 1) * (x - 1) ** 2).sum() + x.sum() ** 2,
    "rosenbrock": lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
    "wells": lambda x: ((x**2 - 1) ** 2).sum() + 0.1 * x.sum(),
    "corners": lambda x: (x - 1).abs().sum() + (x[0] - 2 * x[1]).abs(),
    "wall": lambda x: (1 / x.square()).sum() + x.square().sum(),  # infinite at 0
    "log": lambda x: (x + 3 - torch.log(x + 3)).sum(),  # NaN below -3
}
START = torch.tensor([-1.2, 1.0, 0.5, -0.3], dtype=torch.float64)


def start():
    return START.clone().requires_grad_()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_falls_by_the_squares_of_the_steps_over_tau(loss, tau):
    x = start()
    optimizer = ItohAbe([x], tau)
    for _ in range(15):
        before, point = loss(x).item(), x.detach().clone()
        assert optimizer.step(lambda: loss(x)) == before
        drop, squares = before - loss(x).item(), (x.detach() - point).square().sum().item() / tau
        assert drop >= 0
        assert drop == pytest.approx(squares, rel=1e-8, abs=1e-13 * (1 + abs(before)))


@given(
    tau=st.floats(1e-3, 1e3),
    curvature=st.floats(1e-3, 1e3),
    slope=st.floats(-1e3, 1e3),
    offset=st.floats(-10.0, 10.0),
)
def test_a_parabola_has_its_step_in_closed_form(tau, curvature, slope, offset):
    """S = -g / (a/2 + 1/tau) where V = offset + g s + a s^2 / 2."""
    eps = 2.0**-52
    found = solve(
        Equation(lambda s: offset + slope * s + curvature * s * s / 2, offset, tau, 8 * eps * abs(offset), 1e-10),
        eps ** (1 / 3),
        eps ** (1 / 3),
        eps,
    )
    expected = -slope / (curvature / 2 + 1 / tau)
    seen = expected**2 / tau > 1e-8 * (1 + abs(offset))
    assert found.value <= offset
    if seen:
        assert found.s == pytest.approx(expected, rel=1e-6)
        assert offset - found.value == pytest.approx(found.s**2 / tau, rel=1e-6)


def test_any_tau_leads_to_the_minimum_of_a_quadratic():
    """The fixed points do not depend on tau."""
    H = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    b = torch.tensor([1.0, -1.0])
    for tau, count in ((0.1, 400), (1.0, 60), (10.0, 200)):
        x = torch.zeros(2, requires_grad=True)
        optimizer = ItohAbe([x], tau)
        for _ in range(count):
            optimizer.step(lambda x=x: x @ H @ x / 2 - b @ x)
        torch.testing.assert_close(x.detach(), torch.linalg.solve(H, b), rtol=1e-6, atol=1e-6)


def test_a_quadratic_takes_about_three_values_a_number():
    calls, x = [], torch.zeros(20, requires_grad=True)
    optimizer = ItohAbe([x], 0.1)
    for _ in range(10):
        optimizer.step(lambda: calls.append(0) or (torch.arange(20) * (x - 1) ** 2).sum())
    assert len(calls) <= 10 * (4 * 20 + 2)


def test_where_the_loss_rises_to_both_sides_nothing_moves():
    for loss in (lambda x: x.square().sum(), lambda x: x.abs().sum(), lambda x: (x**4).sum() - 1, lambda x: 0 * x[0]):
        x = torch.zeros(3, requires_grad=True)
        ItohAbe([x], 1.0).step(lambda loss=loss, x=x: loss(x))
        assert torch.equal(x, torch.zeros(3))


def test_a_slope_that_two_far_values_hide_is_found():
    """A long last step measures V where it says the opposite of what it does nearby."""
    x = torch.zeros(1, requires_grad=True)
    optimizer = ItohAbe([x], 1.0)
    optimizer.state[x]["steps"] = torch.tensor([2.0])
    optimizer.step(lambda: (x**4 - 0.3 * x**3 + 0.5 * x).sum())
    assert x.item() < -0.1


def test_modules_groups_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    frozen, x = model[0].bias.clone(), torch.randn(5, 2)
    optimizer = ItohAbe([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}], 1.0)

    def loss():
        return (model(x) - x.prod(1, keepdim=True)).square().mean()

    losses = [optimizer.step(loss).item() for _ in range(20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    assert torch.equal(model[0].bias, frozen)


def test_a_parameter_of_any_layout_and_none_of_its_gradient():
    x, scalar = torch.ones(3, 2).t().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    optimizer = ItohAbe([x, scalar], 1.0)
    for _ in range(50):
        optimizer.step(lambda: (x - torch.arange(6.0).reshape(2, 3)).square().sum() + (scalar - x[0, 0]) ** 2)
    torch.testing.assert_close(x.detach(), torch.arange(6.0).reshape(2, 3), rtol=0, atol=1e-6)
    assert x.grad is None


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(("shape", "manifold"), [((3, 3), "stiefel"), ((2, 4, 2), "stiefel"), ((2, 5), "grassmann")])
def test_on_a_manifold_it_falls_too_and_stays(shape, manifold, retraction):
    U = torch.randn(shape, requires_grad=True)
    n = max(shape[-2:])
    A = torch.diag(torch.arange(1.0, n + 1))

    def loss():
        columns = U if U.shape[-2] == n else U.mT
        return (columns.mT @ A @ columns).diagonal(dim1=-2, dim2=-1).mul(torch.tensor(1.0)).sum() + 0 * U.sum()

    for tau in (1e-3, 1.0, 1e3):
        optimizer = ItohAbe([U], tau, manifold=manifold, retraction=retraction)
        for _ in range(2):
            before = optimizer.step(loss).item()
            squares = optimizer.state[U]["steps"].square().sum().item() / tau
            assert before - loss().item() == pytest.approx(squares, rel=1e-7, abs=1e-12)
    columns = U.detach() if U.shape[-2] == n else U.detach().mT
    eye = torch.eye(columns.shape[-1])
    torch.testing.assert_close(columns.mT @ columns, eye.expand(*shape[:-2], *eye.shape), rtol=0, atol=1e-13)


def test_the_curve_is_the_retraction_of_a_rotation():
    """One pair of rows: the whole step is a single curve."""
    U = torch.tensor([[0.6], [0.8]], requires_grad=True)
    before = U.detach().clone()
    optimizer = ItohAbe([U], 0.5, manifold="stiefel", retraction="qr")
    optimizer.step(lambda: U[0, 0] + 2 * U[1, 0])
    (s,) = optimizer.state[U]["steps"]
    W = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(U.detach(), retract(before, s * W @ before, "qr"), rtol=0, atol=1e-15)


def test_the_lowest_point_on_a_sphere():
    u, c = polar(torch.randn(4, 1)).requires_grad_(), torch.arange(1.0, 5.0)[:, None]
    optimizer = ItohAbe([u], 0.3, manifold="stiefel")
    for _ in range(60):
        optimizer.step(lambda: (c * u).sum())
    torch.testing.assert_close(u.detach(), -c / c.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, "without a closure; expected one that computes the loss"),
        (lambda x: None, "returned NoneType; expected one floating-point number"),
        (lambda x: x, r"returned a tensor \(4,\) of torch.float64; expected one"),
        (lambda x: torch.tensor(1), r"returned a tensor \(\) of torch.int64"),
        (
            lambda x: x.sum().backward(),
            "calls backward, which is not its part here; expected one that returns the loss alone",
        ),
        (lambda x: torch.rand(()), "for the same parameters; expected the same loss"),
        (lambda x: -x.exp().sum(), "falls without bound, to .* along one coordinate; expected"),
        (lambda x: -x.square().sum(), "falls without bound"),
    ],
)
def test_closures_that_are_none(closure, message):
    x = start()
    optimizer = ItohAbe([x], 10.0)
    with pytest.raises(ProblemError, match=message):
        optimizer.step(closure and (lambda: closure(x)))
    assert torch.equal(x, START)


def test_a_start_without_a_loss_is_refused():
    x = start()
    with pytest.raises(NonFiniteError, match="the loss before the step is nan; expected a finite number"):
        ItohAbe([x], 1.0).step(lambda: x.sum() * math.nan)


def test_nothing_to_train_is_refused():
    with pytest.raises(ProblemError, match="no parameter is trained; expected one or more"):
        ItohAbe([torch.ones(2)], 1.0).step(lambda: 1.0)


def test_errors_of_the_closure_leave_no_trial_step_behind():
    x, calls = start(), []

    def loss():
        calls.append(0)
        if len(calls) == 4:
            raise KeyError("of the user")
        return x.square().sum()

    with pytest.raises(KeyError):
        ItohAbe([x], 1.0).step(loss)
    assert torch.equal(x, START)


def test_an_infinite_neighbour_hides_no_descent():
    """V is infinite on one side, and on the other it falls within less than the first trial step."""
    x = torch.zeros(1, requires_grad=True)
    loss = ItohAbe([x], 1.0).step(lambda: 1 + (torch.where(x > 0, torch.inf, x.abs() * (2e12 * x.abs() - 1e6))).sum())
    assert loss == 1
    assert -1e-6 < x.item() < 0


def test_a_closure_with_gradients_of_its_own_is_read_without_a_warning():
    x = start()

    def loss():
        with torch.enable_grad():
            return x.square().sum()

    before = loss().item()
    ItohAbe([x], 0.1).step(loss)
    assert loss().item() < before


@pytest.mark.parametrize("steps", [0, 2])
def test_a_loss_without_a_bound_along_a_later_coordinate_changes_nothing(steps):
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    optimizer = ItohAbe([x, y], 10.0)
    for _ in range(steps):
        optimizer.step(lambda: x.square().sum() + y.square().sum())
    before, state = [x.detach().clone(), y.detach().clone()], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ProblemError, match="falls without bound"):
        optimizer.step(lambda: (x[0] - 5) ** 2 + x[1] ** 2 - (y + 3).exp().sum())
    assert all(map(torch.equal, before, (x, y)))
    after = optimizer.state_dict()["state"]
    assert after.keys() == state.keys()
    assert all(torch.equal(after[i]["steps"], state[i]["steps"]) for i in state)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_any_tau_on_a_manifold(retraction):
    U = torch.randn(3, 2, requires_grad=True)
    C = torch.randn(3, 2)
    for tau in (1e30, 1e300):
        optimizer = ItohAbe([U], tau, manifold="stiefel", retraction=retraction)
        before = (U * C).sum().item()
        assert optimizer.step(lambda: (U * C).sum()).item() == before
        assert (U * C).sum().item() <= before
        torch.testing.assert_close(U.mT @ U, torch.eye(2), rtol=0, atol=1e-4)
