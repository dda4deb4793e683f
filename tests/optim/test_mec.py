"""MEC learning: a rigid body in a viscous fluid."""

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.manifolds import polar
from ocnopt.optim.mec import MEC

pytestmark = pytest.mark.usefixtures("float64")

A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
SHAPES = [(5, 5), (5, 2), (3, 5, 1)]


def loss(U):
    return (U.mT @ A @ U).diagonal(dim1=-2, dim2=-1).mul(1 + torch.arange(U.shape[-1])).sum() + (U**3).sum()


def velocity(U):
    B = torch.randn(*U.shape[:-2], U.shape[-2], U.shape[-2])
    return B - B.mT


def moved(U, B, h, gamma, count=1):
    """U, B after some steps."""
    U = U.clone().requires_grad_()
    optimizer = MEC([U], h, damping=gamma)
    optimizer.state[U]["velocity"] = B
    for _ in range(count):
        optimizer.zero_grad()
        loss(U).backward()
        optimizer.step()
    return U.detach(), optimizer.state[U]["velocity"]


def energy(U, B):
    return (loss(U) + B.square().sum() / 4).item()


@pytest.mark.parametrize("gamma", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_follows_the_equations(shape, gamma):
    """Their right-hand side is the derivative of a step in h at 0, by differences extrapolated to it."""
    U = polar(torch.randn(shape))
    B, h = velocity(U), 1e-4
    X = U.clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(X), X)
    F, P = -G, -gamma * B @ U
    expected = B @ U, (F + P) @ U.mT - U @ (F + P).mT
    for k, start in enumerate((U, B)):
        one, two = ((moved(U, B, size, gamma)[k] - start) / size for size in (h, 2 * h))
        torch.testing.assert_close(2 * one - two, expected[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_falls_by_the_work_of_the_fluid(shape, gamma):
    """d/dt (J + |B|^2/4) = -gamma |B U|^2."""
    U = polar(torch.randn(shape))
    B, h = velocity(U), 1e-4
    one, two = ((energy(*moved(U, B, size, gamma)) - energy(U, B)) / size for size in (h, 2 * h))
    assert 2 * one - two == pytest.approx(-gamma * (B @ U).square().sum().item(), rel=1e-5, abs=1e-4)


def test_on_the_way_too_up_to_the_error_of_the_step():
    U = polar(torch.randn(5, 2))
    B = velocity(U)
    missing = []
    for count in (100, 200):
        X, C, work = U, B, 0.0
        for _ in range(count):
            work += (0.7 / count) * (C @ X).square().sum().item()
            X, C = moved(X, C, 1 / count, 0.7)
        missing.append(energy(X, C) - energy(U, B) + work)
    assert missing[1] == pytest.approx(missing[0] / 2, rel=0.1)
    assert abs(missing[1]) < 0.05 * work


def test_the_viscous_flow_is_exact():
    """Without a force B(t) = D B D; for square U that is e^(-2 gamma t) B."""
    U = polar(torch.randn(4, 4)).requires_grad_()
    B = velocity(U)
    optimizer = MEC([U], 0.5, damping=3.0)
    optimizer.state[U]["velocity"] = B
    U.grad = torch.zeros(4, 4)
    optimizer.step()
    expected = torch.exp(torch.tensor(-2 * 3.0 * 0.5)) * B
    torch.testing.assert_close(optimizer.state[U]["velocity"], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 100.0])
def test_a_thousand_steps_do_not_drift(gamma):
    U = nn.Parameter(torch.randn(6, 3))
    optimizer = MEC([U], 0.1, damping=gamma)
    gradients = torch.randn(7, 6, 3)
    for k in range(1000):
        U.grad = gradients[k % 7]
        optimizer.step()
    B = optimizer.state[U]["velocity"]
    torch.testing.assert_close(U.mT @ U, torch.eye(3), rtol=0, atol=1e-13)
    torch.testing.assert_close(B, -B.mT, rtol=0, atol=1e-11)


def test_without_a_fluid_the_energy_only_trembles():
    U = polar(torch.randn(5, 2))
    B = torch.zeros(5, 5)
    energies = [energy(*moved(U, B, 0.005, 0.0, count)) for count in (1, 100, 400)]
    assert max(energies) - min(energies) < 0.05 * abs(energies[0])


def test_the_body_comes_to_rest_at_a_minimum():
    U = nn.Parameter(torch.randn(5, 2))
    optimizer = MEC([U], 0.1, damping=2.0)
    weights = torch.tensor([2.0, 1.0])
    for _ in range(400):
        optimizer.zero_grad()
        (weights * (U.mT @ A @ U).diagonal()).sum().backward()
        optimizer.step()
    torch.testing.assert_close(U.detach().abs(), torch.eye(5, 2), rtol=0, atol=1e-6)


def test_wide_matrices_turn_by_their_rows():
    U = nn.Parameter(torch.randn(2, 5))
    optimizer = MEC([U], 0.1)
    U.grad = torch.randn(2, 5)
    optimizer.step()
    torch.testing.assert_close(U @ U.mT, torch.eye(2), rtol=0, atol=1e-13)
    assert optimizer.state[U]["velocity"].shape == (5, 5)


def test_vectors_and_moved_matrices_are_refused():
    with pytest.raises(ProblemError, match=r"bias has shape \(3,\) and is torch.float64; expected matrices"):
        MEC(nn.Linear(3, 3).named_parameters(), 0.1)
    U = nn.Parameter(torch.randn(4, 2))
    optimizer = MEC([U], 0.1)
    U.data.mul_(2)
    U.grad = torch.ones(4, 2)
    with pytest.raises(ProblemError, match=r"parameter 0 of its group is off its manifold: \|U\^T U - I\| = 3"):
        optimizer.step()


def test_unconstrained_weights_are_free_particles_in_the_fluid():
    """v <- e^(-gamma h) v - h G, x <- x + h v, beside a matrix that turns as it would alone."""
    h, gamma = 0.2, 0.7
    U, x = polar(torch.randn(5, 2)), torch.tensor([1.0, -2.0])
    free, beside = x.clone().requires_grad_(), U.clone().requires_grad_()
    optimizer = MEC([{"params": [beside]}, {"params": [free], "manifold": "euclidean"}], h, damping=gamma)
    v = torch.zeros(2)
    for _ in range(3):
        optimizer.zero_grad()
        (loss(beside) + free.square().sum() / 2).backward()
        optimizer.step()
        v = torch.exp(torch.tensor(-gamma * h)) * v - h * x
        x = x + h * v
    torch.testing.assert_close(free.detach(), x, rtol=1e-12, atol=0)
    alone, _ = moved(U, torch.zeros(5, 5), h, gamma, count=3)
    torch.testing.assert_close(beside.detach(), alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("lr", "size"), [(1e300, 1.0), (0.1, 1e200), (1e200, 1e200), (1e12, 1.0)])
def test_a_step_beyond_arithmetic_stays_on_the_manifold_or_is_refused(lr, size):
    U = nn.Parameter(torch.randn(5, 3))
    optimizer = MEC([U], lr)
    before, U.grad = U.detach().clone(), size * torch.randn(5, 3)
    try:
        optimizer.step()
    except NonFiniteError as error:
        assert "as before it: lower lr" in str(error)  # noqa: PT017
        assert torch.equal(U, before)
        assert not optimizer.state_dict()["state"]
    torch.testing.assert_close(U.mT @ U, torch.eye(3), rtol=0, atol=1e-4)
