"""Constants of the fields: bounds that hold at every vertex of slopes, and steps that contract, and no longer ones."""

import itertools
import math

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import EULER, TABLEAUS
from ocnopt.neural.runge_kutta_net import RungeKuttaNet
from ocnopt.neural.stability import contractivity_radius, stability
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.usefixtures("float64")

METHODS = ("euler", "improved_euler", "kutta3", "kutta4")


def worst(kind, A):
    """The largest eigenvalue of the symmetric Jacobian over all slopes in [0, 1]: convex, so it sits at a vertex."""
    n = len(A)
    J = torch.zeros(n, n)
    J[: n // 2, n // 2 :], J[n // 2 :, : n // 2] = torch.eye(n // 2), -torch.eye(n // 2)
    values = []
    for slopes in itertools.product([0.0, 1.0], repeat=n):
        D = torch.diag(torch.tensor(slopes))
        M = {"standard": D @ A, "gradient": -A.T @ D @ A, "hamiltonian": J @ A.T @ D @ A}[kind]
        values.append(float(torch.linalg.eigvalsh((M + M.T) / 2)[-1]))
    return values


@pytest.mark.parametrize("kind", ["standard", "gradient", "hamiltonian"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, torch.sigmoid])
def test_the_bounds_enclose_every_choice_of_slopes(kind, activation):
    net = RungeKuttaNet(4, 20, field=kind, activation=activation)
    lower, upper, _ = net.stability()
    for k in range(net.layers):
        values = worst(kind, net.weight[k].detach())
        assert max(values) <= float(upper[k]) + 1e-12
        assert min(values) >= float(lower[k]) - 1e-12


def test_bounds_that_are_attained():
    net = RungeKuttaNet(2, 3, field="gradient")
    A = net.weight.detach()
    found = net.stability()
    assert_close(found.upper, torch.zeros(3))
    assert_close(found.lower, torch.stack([torch.linalg.eigvalsh(-W.T @ W)[-1] for W in A]), rtol=1e-12)
    # a symmetric matrix with relu and every unit on
    net = RungeKuttaNet(2, 1)
    net.weight.data = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    assert_close(net.stability().upper, [3.0], rtol=1e-12)


def test_the_radii_of_the_methods():
    assert [round(contractivity_radius(TABLEAUS[name]), 12) for name in ("euler", "heun", "rk4")] == [1, 1, 1]
    assert 0 < contractivity_radius(TABLEAUS["kutta3"]) <= 1
    assert contractivity_radius(TABLEAUS["midpoint"]) == 0.0


@pytest.mark.parametrize("tableau", METHODS)
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_steps_up_to_the_bound_contract(tableau, activation):
    net = RungeKuttaNet(3, 50, tableau=tableau, field="gradient", step="free", activation=activation)
    with torch.no_grad():
        net.sizes.copy_(net.stability().step_bound)
        for A, b, h in zip(net.weight, net.bias, net.sizes, strict=True):
            y, z = torch.randn(2, 200, 3)
            apart = torch.linalg.vector_norm(net.layer(y, A, b, h) - net.layer(z, A, b, h), dim=-1)
            assert bool((apart <= torch.linalg.vector_norm(y - z, dim=-1) * (1 + 1e-12)).all())


def test_the_bound_of_euler_is_sharp():
    net = RungeKuttaNet(1, 1, field="gradient", activation=torch.relu)
    y, z = torch.tensor([[3.0]]) * net.weight.sign()[0].detach(), torch.tensor([[2.0]]) * net.weight.sign()[0].detach()
    bound = net.stability().step_bound[0]
    for factor, apart in ((0.5, 0.0), (1.0, 1.0), (1.01, 1.02)):
        ends = [net.layer(x, net.weight[0], net.bias[0], factor * bound) for x in (y, z)]
        assert float((ends[0] - ends[1]).detach().abs()) == pytest.approx(apart, abs=1e-12)


@pytest.mark.parametrize("kind", ["standard", "hamiltonian"])
def test_fields_without_a_step_that_contracts(kind):
    assert RungeKuttaNet(2, 3, field=kind).stability().step_bound is None
    assert RungeKuttaNet(2, 3, field="gradient", skip=False).stability().step_bound is None


def test_an_activation_that_mixes_entries():
    with pytest.raises(ProblemError, match="takes an entry to another value beside other entries; expected an element"):
        stability("standard", torch.eye(2)[None], torch.nn.Softmax(-1), EULER)


def test_an_activation_that_works_in_place():
    weight = torch.randn(3, 2, 2)
    found = [stability("gradient", weight, torch.nn.ReLU(inplace=inplace), EULER) for inplace in (True, False)]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_without_weights_any_step_contracts():
    assert stability("gradient", torch.zeros(1, 2, 2), torch.tanh, TABLEAUS["dopri5"]).step_bound.item() == math.inf


def test_an_activation_that_is_too_steep():
    with pytest.raises(ProblemError, match=r"slopes run from -1 to 1; expected 0 to 1.*use tanh"):
        RungeKuttaNet(2, 3, activation=torch.sin).stability()
