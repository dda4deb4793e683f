"""Conformal momentum, Nesterov's method, relativistic gradient descent: what each step keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.optim.momentum import Conformal, Relativistic

pytestmark = pytest.mark.usefixtures("float64")

MU, EPS = 0.8, 0.05


def potential(x):
    """Smooth, coupled, not quadratic."""
    return (x**4).sum() / 4 + torch.sin(x.sum()) + (x[0] - 2 * x[-1]) ** 2


def stepped(make, z, count=1, loss=potential, ahead=None):
    """The state z = (y, v) after some steps; ``ahead`` is c of y = x + c v where the step needs it."""
    x, v = z.clone().chunk(2)
    x.requires_grad_()
    optimizer = make([x])
    optimizer.state[x]["velocity"] = v.clone()
    if ahead is not None:
        optimizer.state[x]["ahead"] = ahead(v)
    for _ in range(count):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    return torch.cat([x.detach(), optimizer.state[x]["velocity"]])


def determinant(make, z, **options):
    """Of the Jacobian of one step, by central differences."""
    h = 1e-5
    columns = [
        (stepped(make, z + h * e, **options) - stepped(make, z - h * e, **options)) / (2 * h) for e in torch.eye(len(z))
    ]
    return torch.linalg.det(torch.stack(columns, 1))


CONFORMAL = {
    "conformal": lambda p: Conformal(p, EPS, momentum=MU),
    **{
        f"relativistic {delta}": lambda p, delta=delta: Relativistic(p, EPS, momentum=MU, delta=delta, alpha=1.0)
        for delta in (0.0, 0.3, 5.0)
    },
}


@pytest.mark.parametrize("make", CONFORMAL.values(), ids=CONFORMAL)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_conformal_methods_contract_volumes_by_mu_per_dimension(make, n):
    torch.testing.assert_close(determinant(make, torch.randn(2 * n)), torch.tensor(MU**n), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("make", "ahead"),
    [
        (lambda p: Conformal(p, EPS, momentum=MU, nesterov=True), MU),
        (lambda p: Relativistic(p, EPS, momentum=MU, delta=0.0, alpha=0.0), MU**0.5),
    ],
    ids=["nesterov", "relativistic"],
)
def test_nesterov_contracts_more_or_less_with_the_curvature(make, ahead):
    """The Jacobian of (x, v), n = 1, is [[1 - eps c, mu - mu eps c], [-eps c, mu - mu eps c]] with the curvature c."""
    z, c = torch.randn(2), 7.0
    found = determinant(make, z, loss=lambda x: c * x.square().sum() / 2, ahead=lambda v: torch.tensor(ahead))
    torch.testing.assert_close(found, torch.tensor(MU * (1 - EPS * c)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_only_alpha_one_is_conformal(alpha):
    def make(p):
        return Relativistic(p, EPS, momentum=MU, delta=0.3, alpha=alpha)

    def ahead(v):
        return MU**0.5 / torch.sqrt(1 + MU * 0.3 * v.square().sum())

    assert abs(determinant(make, torch.randn(4), ahead=ahead) / MU**2 - 1) > 1e-3


@pytest.mark.parametrize("make", CONFORMAL.values(), ids=CONFORMAL)
def test_the_area_between_two_motions_decays_by_mu_per_step(make):
    """Of nearby motions in any potential, the symplectic form dx ^ dv."""
    z, h = torch.randn(4), 1e-5
    one, two = (torch.randn(4) for _ in range(2))

    def area(count):
        a, b = ((stepped(make, z + h * d, count) - stepped(make, z - h * d, count)) / (2 * h) for d in (one, two))
        return a[:2] @ b[2:] - a[2:] @ b[:2]

    start = one[:2] @ two[2:] - one[2:] @ two[:2]
    for count in (1, 5, 20):
        torch.testing.assert_close(area(count) / start, torch.tensor(MU**count), rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.5, 4.0, 40.0])
def test_the_rate_of_dissipation_on_a_quadratic(c):
    """A step is z <- M z with det M = mu: z^T J M z falls by exactly mu, whatever the curvature c."""
    M = torch.tensor([[1 - EPS * c, MU], [-EPS * c, MU]])
    z = torch.tensor([1.0, -0.5])
    form = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) @ M
    for count in (1, 10, 100):
        found = stepped(CONFORMAL["conformal"], z, count, loss=lambda x: c * x.square().sum() / 2)
        torch.testing.assert_close(found, torch.linalg.matrix_power(M, count) @ z, rtol=1e-10, atol=1e-13)
        rounding = 1e-13 * float(form.norm() * found.norm() ** 2)
        torch.testing.assert_close(found @ form @ found, MU**count * (z @ form @ z), rtol=1e-10, atol=rounding)


@pytest.mark.parametrize("c", [0.5, 4.0, 40.0])
def test_the_rate_of_the_relativistic_method_in_its_classical_limit(c):
    """Leapfrog: x + sqrt(mu) v in between; the parameters hold y, so the matrix is that of (y, v)."""
    r = MU**0.5
    drift, kick = torch.tensor([[1.0, r], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-EPS * c, r]])
    M = drift @ torch.tensor([[1.0, 0.0], [0.0, r]]) @ torch.tensor([[1.0, 1.0], [0.0, 1.0]]) @ kick
    z = torch.tensor([1.0, -0.5])
    form = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) @ M
    make = CONFORMAL["relativistic 0.0"]
    for count in (1, 10, 100):
        found = stepped(make, z, count, loss=lambda x: c * x.square().sum() / 2)
        torch.testing.assert_close(found, torch.linalg.matrix_power(M, count) @ z, rtol=1e-10, atol=1e-13)
        rounding = 1e-13 * float(form.norm() * found.norm() ** 2)
        torch.testing.assert_close(found @ form @ found, MU**count * (z @ form @ z), rtol=1e-10, atol=rounding)


def textbook(x, v, mu, eps, delta, alpha):
    """Relativistic gradient descent, as MATH has it, on a plain pair (x, v)."""
    y = x + mu**0.5 * v / torch.sqrt(1 + mu * delta * v @ v)
    w = mu**0.5 * v - eps * torch.func.grad(potential)(y)
    return alpha * y + (1 - alpha) * x + w / torch.sqrt(1 + delta * w @ w), mu**0.5 * w


@given(
    mu=st.floats(0.0, 1.0),
    delta=st.sampled_from([0.0, 0.1, 10.0]),
    alpha=st.floats(0.0, 1.0),
    eps=st.floats(1e-4, 0.02),
)
def test_the_parameters_hold_y_of_the_textbook(mu, delta, alpha, eps):
    x = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
    parts = [part.clone().requires_grad_() for part in (x[:1], x[1:])]  # |v| is that of both
    optimizer = Relativistic(parts, eps, momentum=mu, delta=delta, alpha=alpha)
    v = torch.zeros_like(x)
    for _ in range(10):
        y = x + mu**0.5 * v / torch.sqrt(1 + mu * delta * v @ v)
        torch.testing.assert_close(torch.cat(parts).detach(), y, rtol=1e-10, atol=1e-12)
        optimizer.zero_grad()
        potential(torch.cat(parts)).backward()
        optimizer.step()
        x, v = textbook(x, v, mu, eps, delta, alpha)


def trained(optimizer, x, count=30, schedule=None):
    points = []
    for k in range(count):
        optimizer.zero_grad()
        potential(x).backward()
        if schedule is not None:
            schedule(optimizer.param_groups[0], k)
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def pair(*makes):
    start = torch.randn(3)
    return [(make([x]), x) for make, x in ((m, start.clone().requires_grad_()) for m in makes)]


def test_relativistic_without_delta_and_alpha_is_nesterov():
    one, two = pair(
        lambda p: Relativistic(p, EPS, momentum=MU, delta=0.0, alpha=0.0),
        lambda p: Conformal(p, EPS, momentum=MU, nesterov=True),
    )
    torch.testing.assert_close(trained(*one), trained(*two), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_conformal_is_torch_sgd_while_lr_stays(nesterov):
    """torch holds the velocity in units of lr, and y as well."""
    one, two = pair(
        lambda p: Conformal(p, EPS, momentum=MU, nesterov=nesterov),
        lambda p: torch.optim.SGD(p, EPS, momentum=MU, nesterov=nesterov),
    )
    torch.testing.assert_close(trained(*one), trained(*two), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["nesterov", "relativistic"])
def test_a_schedule_of_momentum_leaves_the_position_alone(name):
    """The step back from y to x uses the mu that led to y."""

    def schedule(group, k):
        group["momentum"], group["lr"] = 0.5 + 0.01 * k, EPS / (1 + k)

    start = torch.randn(3)
    x = start.clone().requires_grad_()
    if name == "nesterov":
        optimizer = Conformal([x], EPS, momentum=0.1, nesterov=True)
    else:
        optimizer = Relativistic([x], EPS, momentum=0.1, delta=0.0, alpha=0.0)
    found = trained(optimizer, x, schedule=schedule)[-1]
    position, w = start, torch.zeros(3)
    y = position
    for k in range(30):
        mu, previous = 0.5 + 0.01 * k, 0.5 + 0.01 * (k - 1)
        carried = mu if name == "nesterov" else (mu * previous) ** 0.5  # v = sqrt(mu) w there
        w = carried * w - EPS / (1 + k) * torch.func.grad(potential)(y)
        position = position + w
        y = position + mu * w
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-12)


def test_no_relativistic_step_is_longer_than_the_speed_of_light():
    x = torch.full((4,), 1e8, requires_grad=True)
    optimizer = Relativistic([x], 10.0, momentum=0.9, delta=0.25, alpha=1.0)
    for _ in range(20):
        before = x.detach().clone()
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
        assert (x.detach() - before).norm() <= 2 * 2.0 * (1 + 1e-12)  # a step and a look ahead


def test_parameters_without_gradients_stay_and_do_not_count():
    x, y, alone = (torch.ones(2).requires_grad_() for _ in range(3))
    both, one = Relativistic([x, y], 0.1), Relativistic([alone], 0.1)
    for p, optimizer in ((x, both), (alone, one)):
        p.square().sum().backward()
        optimizer.step()
    assert torch.equal(x, alone)
    assert torch.equal(y, torch.ones(2))


def test_a_huge_gradient_in_single_precision_still_moves_at_the_speed_of_light():
    x = torch.zeros(1, dtype=torch.float32, requires_grad=True)
    optimizer = Relativistic([x], 1.0, momentum=0.0, delta=4.0)
    x.grad = torch.full((1,), 1e25, dtype=torch.float32)
    optimizer.step()
    assert x.item() == pytest.approx(-0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e160),
        (torch.float64, 1e307),
        (torch.float32, 2e19),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
        (torch.float32, 1e-30),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_step_has_its_length_whatever_the_gradient(dtype, size, alpha):
    """In closed form: v / sqrt(1 + delta |v|^2), for which |v|^2 need not exist."""
    x = torch.zeros(3, dtype=dtype, requires_grad=True)
    optimizer = Relativistic([x], lr=1.0, momentum=0.0, delta=4.0, alpha=alpha)
    x.grad = torch.full_like(x, size)
    optimizer.step()
    expected = 0.5 / 3**0.5 if size > 1 else size
    assert x.tolist() == pytest.approx([-expected] * 3, rel=2 * torch.finfo(dtype).eps)


def test_after_a_huge_gradient_the_next_steps_are_the_longest():
    x = torch.zeros(3, dtype=torch.float32, requires_grad=True)
    optimizer = Relativistic([x], lr=1.0, momentum=0.9)
    x.grad, lengths = torch.full_like(x, 1e30), []
    for _ in range(20):
        before = x.detach().clone()
        optimizer.step()
        x.grad.fill_(1.0)
        lengths.append(float((x.detach() - before).norm()))
    assert lengths == pytest.approx([2.0] * 20, rel=1e-5)  # a step, and the look ahead
