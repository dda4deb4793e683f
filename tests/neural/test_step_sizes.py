"""Learned step sizes: the projection on the simplex, optimisers that know nothing of it, and pruning."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

import ocnopt as oc
from ocnopt.errors import ProblemError
from ocnopt.neural.runge_kutta_net import RungeKuttaNet, project_simplex
from tests.neural.nets import TABLEAUS, by_hand, loss
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.usefixtures("float64")


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), total=st.floats(0.1, 10))
def test_the_projection_on_the_simplex(values, total):
    v = torch.tensor(values, dtype=torch.float64)
    h = project_simplex(v, total)
    assert float(h.min()) >= 0
    assert float(h.sum()) == pytest.approx(total, abs=1e-11)
    assert_close(project_simplex(h, total), h, atol=1e-11)

    # the KKT conditions: h = max(v - theta, 0), theta from the sum alone
    def left(theta):
        return np.maximum(v.numpy() - theta, 0).sum() - total

    theta = scipy.optimize.brentq(left, float(v.max()) - 2 * total, float(v.max()), xtol=1e-13)
    assert_close(h, np.maximum(v.numpy() - theta, 0), atol=1e-9)


OPTIMISERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.1),
    "lbfgs": lambda net: torch.optim.LBFGS(net.parameters(), max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_plain_optimiser_cannot_leave_the_simplex(name):
    net, x = RungeKuttaNet(2, 6, step="simplex", tableau="kutta3"), torch.randn(20, 2)
    optimiser = OPTIMISERS[name](net)

    def closure():
        optimiser.zero_grad()
        value = loss(net(x))
        value.backward()
        return value

    for _ in range(10):
        optimiser.step(closure)
        saved = net.state_dict()["sizes"]
        assert abs(float(saved.sum()) - 1) < 1e-12
        assert float(saved.min()) >= 0
        assert torch.equal(net.step_sizes, saved)
        assert abs(float(net.step_sizes.sum()) - 1) < 1e-12
        expected = by_hand("kutta3", "standard", net.weight, net.bias, net.step_sizes, x)
        assert_close(net(x).detach(), expected.detach(), rtol=1e-11, atol=1e-13)


def test_a_step_on_the_simplex_is_projected_gradient_descent():
    net, x = RungeKuttaNet(2, 5, step="simplex", horizon=2.0), torch.randn(20, 2)
    optimiser, h = torch.optim.SGD(net.parameters(), lr=0.5), net.step_sizes
    loss(net(x)).backward()
    expected = project_simplex(h - 0.5 * net.sizes.grad, 2.0)
    optimiser.step()
    net(x)
    assert_close(net.sizes.detach(), expected, rtol=1e-14)
    assert float(net.sizes.detach().sum()) == pytest.approx(2.0, abs=1e-12)


def test_forward_passes_on_the_simplex_do_not_disturb_each_other():
    net, x = RungeKuttaNet(2, 5, step="simplex"), torch.randn(20, 2)
    with torch.no_grad():
        net.sizes.add_(0.1 * torch.randn(5))
    first = loss(net(x))
    net(x), net.step_sizes, net.state_dict()
    first.backward()
    assert bool(net.sizes.grad.isfinite().all())


@pytest.mark.parametrize("step", ["free", "simplex"])
@pytest.mark.parametrize("tableau", TABLEAUS)
def test_pruning_keeps_the_function(step, tableau):
    net, x = RungeKuttaNet(2, 5, step=step, tableau=tableau), torch.randn(20, 2)
    with torch.no_grad():
        net.sizes.copy_(torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25]))
    before, weight = net(x).detach(), net.weight
    loss(net(x)).backward()
    assert net.prune() is net
    assert net.layers == 3
    assert net.weight is weight
    assert net.weight.grad is None
    assert_close(net(x).detach(), before, rtol=1e-14)
    assert_close(net.step_sizes, [0.25, 0.5, 0.25])
    loss(net(x)).backward()
    torch.optim.SGD(net.parameters(), lr=1e-4).step()
    assert net.prune().layers == 3
    copied = RungeKuttaNet(2, 3, step=step, tableau=tableau)
    copied.load_state_dict(net.state_dict())
    assert_close(copied(x).detach(), net(x).detach(), rtol=1e-14)


def test_a_network_may_lose_all_its_layers():
    net, x = RungeKuttaNet(2, 2, step="free", adjoint="discrete"), torch.randn(3, 2)
    net.sizes.data.zero_()
    assert torch.equal(net.prune()(x), x)
    assert RungeKuttaNet(2, 4).prune().layers == 4


SIZES = {
    "equal": torch.ones,
    "spread": lambda n: torch.sin(torch.arange(n) ** 2.0),
    "one ahead": lambda n: torch.cat([torch.ones(1), -torch.ones(n - 1)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("horizon", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_of_any_magnitude_sum_to_the_horizon(sizes, horizon, dtype):
    net = RungeKuttaNet(2, 15, step="simplex", horizon=horizon).to(dtype)
    for magnitude in (1e-30, 1e2, 1e4, 1e8, 1e17, 1e38):
        net.sizes.data = (magnitude * sizes(15)).to(dtype)
        h = net.step_sizes
        assert float(h.min()) >= 0
        assert abs(float(h.double().sum()) / horizon - 1) < 8 * torch.finfo(dtype).eps
        assert torch.equal(net.step_sizes, h)


def test_a_far_projection_is_that_of_its_differences():
    v = torch.tensor([0.25, 0.5, -1.0], dtype=torch.float32)
    assert_close(project_simplex(v + 2.0**20), project_simplex(v), rtol=1e-7)


def test_tensors_in_place_of_parameters_are_left_as_they_are():
    net, x = RungeKuttaNet(2, 4, step="simplex"), torch.randn(3, 2)
    t = torch.tensor([3.0, 1.0, 2.5, 0.0], requires_grad=True)
    out = torch.func.functional_call(net, {"sizes": t}, (x,))
    assert t.tolist() == [3.0, 1.0, 2.5, 0.0]
    assert net.sizes.tolist() == [0.25] * 4
    (slopes,) = torch.autograd.grad(loss(out), t)
    net.sizes.data.copy_(t)
    assert_close(out.detach(), net(x).detach(), rtol=1e-14)
    loss(net(x)).backward()
    assert_close(slopes, net.sizes.grad, rtol=1e-14)


def test_nets_on_the_simplex_are_stacked_and_exported():
    nets, x = [RungeKuttaNet(2, 3, step="simplex") for _ in range(3)], torch.randn(5, 2)
    for net in nets:
        net.sizes.data.normal_()
    values, _ = torch.func.stack_module_state(nets)
    stacked = torch.vmap(lambda values: torch.func.functional_call(nets[0], values, (x,)))(values)
    exported = torch.export.export(nets[0], (x,)).module()
    outputs = [net(x).detach() for net in nets]
    assert_close(stacked.detach(), torch.stack(outputs), rtol=1e-13)
    assert_close(exported(x).detach(), outputs[0], rtol=1e-13)


COMPILED = """
import torch
from ocnopt.neural.runge_kutta_net import RungeKuttaNet
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
net, x = RungeKuttaNet(2, 3, step="simplex"), torch.randn(5, 2)
found = []
for run in (torch.compile(net, fullgraph=True, backend="eager"), net):
    net.sizes.data.copy_(torch.arange(3.0)), net.zero_grad()
    run(x).sin().sum().backward()
    assert net.sizes.tolist() == [0.0, 0.0, 1.0]
    found.append(net.sizes.grad.clone())
torch.testing.assert_close(*found, rtol=1e-13, atol=0)
"""


def test_a_net_on_the_simplex_is_one_graph():
    """Without the type checks that the tests put around every function."""
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_from_before_pruning_leaves_a_gradient():
    net = RungeKuttaNet(2, 3, step="free")
    y = net(torch.randn(4, 2)).sum()
    net.sizes.data[1] = 0.0
    net.prune()
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda net: oc.optim.Conformal(net.named_parameters(), 0.1),
        lambda net: oc.optim.Relativistic(net.named_parameters(), 0.1),
        lambda net: oc.optim.Riemannian(net.named_parameters(), 0.1, manifold="euclidean"),
        lambda net: oc.optim.MEC(net.named_parameters(), 0.1, manifold="euclidean"),
        lambda net: oc.optim.MEC([("weight", net.weight)], 0.1),
        lambda net: oc.optim.ItohAbe(net.named_parameters(), 0.1),
        lambda net: oc.SNOpt(net, 0.1),
    ],
    ids=["conformal", "relativistic", "riemannian", "mec", "mec on stiefel", "itoh-abe", "snopt"],
)
@pytest.mark.filterwarnings("ignore:SNOpt preconditions:UserWarning")
def test_optimisers_from_before_pruning_say_so(make):
    net, x = RungeKuttaNet(2, 3, step="free"), torch.randn(4, 2)
    optimiser = make(net)

    def step():
        if isinstance(optimiser, oc.optim.ItohAbe):
            return optimiser.step(lambda: loss(net(x)))
        loss(net(x)).backward()
        return optimiser.step()

    step()
    net.sizes.data[1] = 0.0
    net.prune()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ProblemError, match=r"of '?weight'? has shape .*; expected .* before prune\(\)"):
        step()
    assert all(map(torch.equal, before, net.parameters()))
