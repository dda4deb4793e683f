"""What a backward pass must find as the forward pass did: random numbers, autocast, flags, buffers, tensors."""

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from tests.neural.cases import Plain, Tanh, distance, gradients, start

CONTROLS = [{"method": "rk4", "steps": 5}, {"method": "dopri5", "steps": 5}, {"rtol": 1e-1, "atol": 1e-1}]


class Dropping(nn.Module):
    """A field with a little dropout, so that error control still gets through."""

    def __init__(self, from_time=-1.0):
        super().__init__()
        self.net, self.drop, self.from_time = Tanh(3, 32), nn.Dropout(0.2), from_time

    def forward(self, t, x):
        y = self.net(t, x)
        return 0.1 * (self.drop(y) if t > self.from_time else y)


class Watcher:
    def stage(self, input_weight, gradient_weight):
        return torch.enable_grad()

    def terminal(self, x, slope, costate):
        pass


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("from_time", [-1.0, 0.5])
@pytest.mark.parametrize("budget", [2**20, 0])
@pytest.mark.parametrize("watched", [False, True])
def test_dropout(control, from_time, budget, watched):
    field, x = Dropping(from_time), start(8, 3)
    torch.manual_seed(1)
    value, expected = gradients(NeuralODE(field, adjoint="backprop", **control), x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    ode = NeuralODE(field, checkpoint_bytes=budget, **control)
    if watched:
        ode.observe(Watcher())
    ours, gradient = gradients(ode, x)
    assert torch.equal(ours, value)
    assert distance(gradient, expected) < 1e-12
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(2)
    assert not torch.equal(ode(x), value)


def test_dropout_and_the_continuous_adjoint_warn():
    with pytest.warns(UserWarning, match='draws random numbers .*use adjoint="discrete"'):
        NeuralODE(Dropping(), method="rk4", adjoint="continuous")(start(8, 3))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_autocast(control, watched):
    torch.manual_seed(0)
    field, x = Tanh(3, 16).float(), torch.randn(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, expected = gradients(NeuralODE(field, adjoint="backprop", **control), x)
        ode = NeuralODE(field, **control)
        if watched:
            ode.observe(Watcher())
        leaf = x.clone().requires_grad_()
        ours = ode(leaf)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, value)
    # The backward pass runs outside the region.
    found = torch.autograd.grad(torch.sin(ours + 0.3).pow(2).sum(), (leaf, *field.parameters()))
    gradient = torch.cat([part.flatten() for part in found])
    exact = gradients(NeuralODE(field, adjoint="backprop", **control), x)[1]
    # Back-propagation sums in bfloat16 where several stages share one cast weight; both are that far from float32.
    assert distance(gradient, expected) < 5e-3
    assert distance(expected, exact) < 3e-2
    assert distance(gradient, exact) < 3e-2


@pytest.mark.parametrize("watched", [False, True])
def test_autocast_without_its_cache_is_exact(watched):
    field, x = Tanh(3, 16).float(), torch.randn(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = gradients(NeuralODE(field, adjoint="backprop"), x)[1]
        ode = NeuralODE(field)
        if watched:
            ode.observe(Watcher())
        y = ode(x)
    gradient = torch.autograd.grad(torch.sin(y + 0.3).pow(2).sum(), [*field.parameters()])
    assert distance(torch.cat([part.flatten() for part in gradient]), expected[x.numel() :]) < 1e-5


def test_weights_cast_without_a_graph_are_forgotten():
    field, x = Tanh().float(), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = NeuralODE(field)(x)
        again = field(torch.tensor(0.0), x)
    again.float().sum().backward()
    assert field.inner.weight.grad is not None
    assert y.requires_grad


def test_training_flags_are_those_of_the_forward_pass():
    field, x = Dropping(), start(8, 3)
    control = {"method": "rk4", "steps": 5}
    torch.manual_seed(1)
    expected = gradients(NeuralODE(field, adjoint="backprop", **control), x)[1]
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    y = NeuralODE(field, **control)(leaf)
    field.eval()
    found = torch.autograd.grad(torch.sin(y + 0.3).pow(2).sum(), (leaf, *field.parameters()))
    assert distance(torch.cat([part.flatten() for part in found]), expected) < 1e-12
    assert not field.drop.training


def test_batch_statistics_move_once():
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    field = Plain(lambda t, x: net(x))
    field.net = net
    x = start(16, 3)
    value, expected = gradients(NeuralODE(field, method="rk4", steps=4, adjoint="backprop"), x)
    moved = net[1].running_mean.clone()
    net[1].reset_running_stats()
    ours, gradient = gradients(NeuralODE(field, method="rk4", steps=4), x)
    torch.testing.assert_close(net[1].running_mean, moved, rtol=0, atol=1e-15)
    assert torch.equal(ours, value)
    assert distance(gradient, expected) < 1e-12


FOUR_STEPS = {"method": "rk4", "steps": 4}


def backward(y, field):
    return torch.cat([g.flatten() for g in torch.autograd.grad(torch.sin(y + 0.3).sum(), [*field.parameters()])])


ADJOINTS = pytest.mark.parametrize(("adjoint", "budget"), [("discrete", 2**20), ("discrete", 0), ("continuous", 0)])


@ADJOINTS
def test_hooks_of_parameters_act_once_on_the_whole_gradient(adjoint, budget):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, adjoint=adjoint, checkpoint_bytes=budget, **FOUR_STEPS)
    expected = backward(ode(x), field)
    seen = []
    handle = field.inner.weight.register_hook(lambda g: seen.append(g) or 2 * g)
    found = backward(ode(x), field)
    count = field.inner.weight.numel()
    torch.testing.assert_close(found, torch.cat([2 * expected[:count], expected[count:]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[0].flatten(), expected[:count], rtol=1e-12, atol=0)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(backward(ode(x), field), expected, rtol=1e-12, atol=0)


def test_a_batch_norm_with_late_noise_moves_once():
    """Its walk is taken twice where noise is first drawn on the way; the statistics must not see that."""
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    field = Plain(lambda t, x: net(x) + (0.01 * torch.randn_like(x) if t > 0.4 else 0.0))
    field.net, x = net, start(16, 3)
    counts = []
    for budget in (2**20, 0):
        net[1].reset_running_stats()
        NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS)(x).sum().backward()
        counts.append((int(net[1].num_batches_tracked), net[1].running_mean.clone()))
    assert counts[0][0] == counts[1][0] == 16


class NoisyPotential(nn.Module):
    """Draws noise before it differentiates, which fails without a graph."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, t, x):
        noise = torch.randn_like(x)
        return noise - torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("budget", [2**23, 1, 0])
def test_noise_drawn_before_the_field_differentiates(budget):
    field, x = NoisyPotential(), start(4, 3)
    torch.manual_seed(1)
    value, expected = gradients(NeuralODE(field, adjoint="backprop", **FOUR_STEPS), x)
    torch.manual_seed(1)
    ours, gradient = gradients(NeuralODE(field, checkpoint_bytes=budget, **FOUR_STEPS), x)
    assert torch.equal(ours, value)
    assert distance(gradient, expected) < 1e-12


def test_an_edit_of_what_the_field_saved_is_seen():
    """Also at the first evaluation, whose graph is weighed."""

    def function(t, x):
        y = torch.exp(scale * x)
        z = y * 1.0
        y.mul_(3.0)
        return z + 0.0 * y.detach()

    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    field = Plain(function)
    field.scale = scale
    y = NeuralODE(field, method="euler", steps=1)(start(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
class TestCapturedTensors:
    def test_a_leaf_is_an_error_with_its_name(self, adjoint):
        field = Tanh()
        field.scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        outer = Plain(lambda t, x: field(t, x) * field.scale)
        outer.net = field
        with pytest.raises(ProblemError, match=r"'net.scale' of shape \(1,\).*adjoint_params=\[\.\.\.\]"):
            NeuralODE(outer, adjoint=adjoint)(start(4, 3))

    def test_what_was_computed_outside_is_an_error(self, adjoint):
        encoder, field = nn.Linear(2, 3).double(), Tanh()
        context = encoder(start(4, 2))
        with pytest.raises(ProblemError, match=r"a tensor of shape \(3.*its gradient would be lost"):
            NeuralODE(Plain(lambda t, x: field(t, x) + context), adjoint=adjoint)(start(4, 3))

    def test_even_where_nothing_else_needs_gradients(self, adjoint):
        scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ProblemError, match="its gradient would be lost"):
            NeuralODE(Plain(lambda t, x: x * scale), adjoint=adjoint)(start(4, 3))

    def test_adjoint_params_give_its_gradient(self, adjoint):
        scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        net = Tanh()
        field = Plain(lambda t, x: net(t, x) * scale)
        field.net = net
        x = start(4, 3)
        tight = {"rtol": 1e-9, "atol": 1e-9}
        expected = gradients(NeuralODE(field, adjoint="backprop", **tight), x, extra=[scale])[1]
        ode = NeuralODE(field, adjoint=adjoint, adjoint_params=[scale], **tight)
        assert distance(gradients(ode, x, extra=[scale])[1], expected) < (1e-12 if adjoint == "discrete" else 1e-6)

    def test_adjoint_params_may_change_with_every_call(self, adjoint):
        encoder, net = nn.Linear(2, 3).double(), Tanh()
        held = {}
        field = Plain(lambda t, x: net(t, x) + held["context"])
        field.net = net
        x, z = start(4, 3), start(4, 2)
        tight = {"rtol": 1e-9, "atol": 1e-9}
        found = []
        for ode in (
            NeuralODE(field, adjoint="backprop", **tight),
            NeuralODE(field, adjoint=adjoint, adjoint_params=lambda: [held["context"]], **tight),
        ):
            for _ in range(2):
                held["context"] = torch.tanh(encoder(z))
                found.append(gradients(ode, x, extra=[*encoder.parameters()])[1])
        assert distance(found[3], found[0]) < (1e-12 if adjoint == "discrete" else 1e-6)
        assert torch.equal(found[3], found[2])

    def test_without_gradients_nothing_is_lost(self, adjoint):
        scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            NeuralODE(Plain(lambda t, x: x * scale), adjoint=adjoint)(start(4, 3))


OWN = [(adjoint, method) for adjoint in ("discrete", "continuous") for method in ("euler", "heun", "rk4", "dopri5")]


@pytest.mark.parametrize(("adjoint", "method"), [*OWN, ("continuous", "heun3")])
@pytest.mark.parametrize("window", [(0.3, 0.7), (0.42, 0.48), (0.45, 0.55), (-0.1, 0.05), (0.95, 1.1)])
@pytest.mark.parametrize("steps", [3, 10])
def test_a_tensor_that_is_met_on_the_way_alone_is_refused(adjoint, method, window, steps):
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    net, met = Tanh(), []

    def switched(t, x):
        is_inside = window[0] < t < window[1]
        met.append(is_inside and torch.is_grad_enabled())
        return net(t, x) * scale if is_inside else net(t, x)

    field, is_refused = Plain(switched), False
    field.net = net
    try:
        NeuralODE(field, adjoint=adjoint, method=method, steps=steps, checkpoint_bytes=0)(start(4, 3)).sum().backward()
    except ProblemError as error:
        is_refused = "its gradient would be lost" in str(error)
    assert is_refused == any(met)
    assert any(met) or window[0] > 0.3


def test_back_propagation_through_torchdiffeq_needs_no_adjoint_params():
    pytest.importorskip("torchdiffeq")
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    field = Plain(lambda t, x: -x * scale)
    NeuralODE(field, method="fehlberg2")(start(4, 3)).sum().backward()
    assert scale.grad is not None
    with pytest.raises(ProblemError, match="its gradient would be lost"):
        NeuralODE(field, method="fehlberg2", adjoint="continuous")(start(4, 3))
    late = Plain(lambda t, x: -x * scale if t > 0.5 else -x)
    with pytest.raises(ProblemError, match="its gradient would be lost"):
        NeuralODE(late, method="fehlberg2", adjoint="continuous")(start(4, 3))


class Potential(nn.Module):
    """A field that differentiates inside: the negative gradient of a scalar network, and its divergence."""

    def __init__(self, detaches=False):
        super().__init__()
        self.net, self.detaches = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double(), detaches

    def forward(self, t, state):
        x, _ = state
        if not x.requires_grad:
            x = x.detach().requires_grad_() if self.detaches else x.requires_grad_()
        slope = -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        rows = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return slope, -sum(rows)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_a_field_may_differentiate_inside(adjoint):
    field, x = Potential(), (start(3, 2), torch.zeros(3, dtype=torch.float64))
    tight = {"rtol": 1e-9, "atol": 1e-9}
    value, expected = gradients(NeuralODE(field, adjoint="backprop", **tight), x)
    ours, gradient = gradients(NeuralODE(field, adjoint=adjoint, **tight), x)
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    assert distance(gradient, expected) < (1e-12 if adjoint == "discrete" else 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(NeuralODE(field, **tight)(x), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detaches", [False, True])
@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_a_field_may_differentiate_inside_by_data_that_need_no_gradient(adjoint, detaches):
    field, tight = Potential(detaches), {"rtol": 1e-9, "atol": 1e-9}
    found, data = {}, start(3, 2)
    for kind in (adjoint, "backprop"):
        x, density = NeuralODE(field, adjoint=kind, **tight)((data.clone(), torch.zeros(3, dtype=torch.float64)))
        found[kind] = torch.autograd.grad((x.square().sum(1) + density).sum(), [*field.parameters()], allow_unused=True)
    for ours, expected in zip(found[adjoint], found["backprop"], strict=True):
        assert ours is expected is None or (ours - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("options", [{"adjoint": "discrete"}, {"adjoint": "continuous"}, {"error_norm": "sample"}])
@pytest.mark.parametrize("detaches", [None, False, True])
def test_a_tensor_that_is_met_later_is_refused_where_nothing_before_needs_gradients(options, detaches):
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    net = Potential(detaches).requires_grad_(False)
    data, until = (start(3, 2), torch.zeros(3, 1, dtype=torch.float64)), 0.5

    def switched(t, state):
        slope, trace = tuple(-part for part in state) if detaches is None else net(t, state)
        return slope if float(t.detach().max()) < until else scale * slope, trace.view(-1, 1)

    ode = NeuralODE(Plain(switched), **options)
    with pytest.raises(ProblemError, match=r"of shape \(1,\).*its gradient would be lost"):
        ode(data)
    with torch.no_grad():
        value = ode(data)
    until = 2.0
    found = ode(data)
    assert not found[0].requires_grad
    torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def test_errors_of_the_field_pass_through():
    def function(t, x):
        raise RuntimeError("mine")

    with torch.no_grad(), pytest.raises(RuntimeError, match="mine"):
        NeuralODE(Plain(function))(start(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("budget", [2**20, 0])
def test_dropout_on_a_gpu(budget):
    field, x = Dropping().cuda(), start(8, 3).cuda()
    control = {"method": "dopri5", "steps": 5}
    torch.manual_seed(1)
    value, expected = gradients(NeuralODE(field, adjoint="backprop", **control), x)
    torch.manual_seed(1)
    ours, gradient = gradients(NeuralODE(field, checkpoint_bytes=budget, **control), x)
    assert torch.equal(ours, value)
    assert distance(gradient, expected) < 1e-12
