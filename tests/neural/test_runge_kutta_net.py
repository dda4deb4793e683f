"""Runge-Kutta networks: loops written by hand, the symplectic adjoint as published, files, dtypes, messages."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ocnopt as oc
from ocnopt.errors import OcnoptError, ProblemError
from ocnopt.neural.runge_kutta_net import METHODS, RungeKuttaNet
from tests.neural.nets import FIELDS, PUBLISHED, TABLEAUS, by_hand, field, loss, made, stages
from tests.oracles.compare import assert_close

pytestmark = pytest.mark.usefixtures("float64")


def gradients(net, x, adjoint):
    net.adjoint, leaf = adjoint, x.clone().requires_grad_()
    return torch.autograd.grad(loss(net(leaf)), [leaf, *net.parameters()])


@pytest.mark.parametrize("tableau", TABLEAUS)
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("step", ["fixed", "free"])
def test_a_network_is_the_loop_written_by_hand(tableau, kind, step):
    net, x = made(tableau, kind, step), torch.randn(5, 4)
    assert_close(
        net(x).detach(),
        by_hand(tableau, kind, net.weight, net.bias, net.step_sizes, x).detach(),
        rtol=1e-13,
        atol=1e-14,
    )
    assert len(net.states(x)) == 4
    assert torch.equal(net.states(x)[-1], net(x))


def test_the_nets_of_the_paper_are_settings():
    x = torch.randn(6, 2)
    net = RungeKuttaNet(2, 3, skip=False, horizon=3)
    y = x
    for A, b in zip(net.weight, net.bias, strict=True):
        y = torch.tanh(y @ A.T + b)
    assert_close(net(x).detach(), y.detach(), rtol=1e-13)
    resnet = RungeKuttaNet(2, 3)
    assert_close(resnet.step_sizes, [1 / 3] * 3)
    assert [name for name, _ in resnet.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in RungeKuttaNet(2, 3, step="free").named_parameters()] == ["weight", "bias", "sizes"]


@pytest.mark.parametrize("tableau", [*TABLEAUS, "dopri5", "bosh3", "midpoint"])
@pytest.mark.parametrize("kind", FIELDS)
def test_the_adjoint_is_back_propagation_and_finite_differences(tableau, kind):
    net, x = made(tableau, kind), torch.randn(5, 4)
    ours, expected = gradients(net, x, "discrete"), gradients(net, x, "backprop")
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-14)
    direction = [torch.randn_like(g) for g in ours]
    values = []
    for eps in (1e-5, -1e-5):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction[1:], strict=True):
                p += eps * d
            values.append(float(loss(moved(x + eps * direction[0]))))
    slope = sum(float((g * d).sum()) for g, d in zip(ours, direction, strict=True))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-7, abs=1e-8)


def vjp(kind, W, b, y, cotangent):
    y, W, b = (v.detach().requires_grad_() for v in (y, W, b))
    return torch.autograd.grad(field(kind, W, b, y), (y, W, b), cotangent)


@pytest.mark.parametrize("tableau", TABLEAUS)
@pytest.mark.parametrize("divide", [True, False], ids=["as published", "without divisions"])
def test_the_adjoint_is_the_symplectic_partner(tableau, divide):
    """The formulas of arXiv 1904.05657, (26) to (28), and the ones that need no b_i != 0, stage by stage."""
    net, x, kind = made(tableau, "gradient"), torch.randn(5, 4), "gradient"
    A, c = PUBLISHED[tableau]
    states = [v.detach() for v in net.states(x)]
    end = states[-1].clone().requires_grad_()
    (p,) = torch.autograd.grad(loss(end), end)
    found = []
    for k in (2, 1, 0):
        W, b, h = net.weight[k].detach(), net.bias[k].detach(), float(net.sizes[k].detach())
        points, slopes = stages(A, kind, W, b, h, states[k])
        s, mu, pulled = len(c), {}, {}
        for i in reversed(range(s)):
            if divide:
                mu[i] = (
                    h * c[i] * (p + h * sum(A[j][i] * c[j] / c[i] * pulled[j][0] / (h * c[j]) for j in range(i + 1, s)))
                )
            else:
                mu[i] = h * (c[i] * p + sum(A[j][i] * pulled[j][0] for j in range(i + 1, s)))
            pulled[i] = vjp(kind, W, b, points[i], mu[i])
        # x_next = x + h sum_i b_i k_i: what h moves directly, and through the stages
        size = sum(float((mu[i] * slopes[i]).sum()) for i in range(s)) / h
        p = p + sum(pulled[i][0] for i in range(s))
        found.append((sum(v[1] for v in pulled.values()), sum(v[2] for v in pulled.values()), size))
    start, weight, bias, sizes = gradients(net, x, "discrete")
    assert_close(start, p, rtol=1e-12)
    for k, (dW, db, dh) in zip((2, 1, 0), found, strict=True):
        assert_close(weight[k], dW, rtol=1e-12, atol=1e-14)
        assert_close(bias[k], db, rtol=1e-12, atol=1e-14)
        assert float(sizes[k]) == pytest.approx(dh, rel=1e-12)


@pytest.mark.parametrize("tableau", TABLEAUS)
def test_a_step_of_size_zero_has_a_gradient(tableau):
    net, x = made(tableau), torch.randn(5, 4)
    with torch.no_grad():
        net.sizes[1] = 0.0
    *_, ours = gradients(net, x, "discrete")
    *_, expected = gradients(net, x, "backprop")
    assert_close(ours, expected, rtol=1e-12)
    x1 = net.states(x)[1].detach()
    rest = [v[[0, 2]].detach() for v in (net.weight, net.bias, net.sizes)]
    leaf = x1.clone().requires_grad_()
    (p,) = torch.autograd.grad(loss(by_hand(tableau, "standard", *(v[1:] for v in rest), leaf)), leaf)
    slope = field("standard", net.weight[1], net.bias[1], x1).detach()
    assert float(ours[1]) == pytest.approx(float((p * slope).sum()), rel=1e-12)


def test_the_discrete_adjoint_keeps_one_state_a_layer():
    x, bytes_kept = torch.randn(100, 4), {}
    for adjoint in ("discrete", "backprop"):
        net = made("kutta4", layers=3, adjoint=adjoint)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            net(x)
        bytes_kept[adjoint] = sum(t.nbytes for t in {t.data_ptr(): t for t in kept}.values())
    parameters = sum(p.nbytes for p in net.parameters())
    # a probe of one row looks for captured tensors before
    assert 3 * x.nbytes + parameters <= bytes_kept["discrete"] < 4 * x.nbytes + parameters
    assert bytes_kept["backprop"] > 5 * bytes_kept["discrete"]


def test_leading_axes_and_an_empty_batch():
    net = made()
    x = torch.randn(2, 3, 4)
    assert_close(net(x).detach(), net(x.reshape(6, 4)).reshape(2, 3, 4).detach(), rtol=1e-14)
    for adjoint in ("discrete", "backprop"):
        net.adjoint = adjoint
        out = net(torch.zeros(0, 4))
        out.sum().backward()
        assert out.shape == (0, 4)


def test_copies_and_files(tmp_path):
    net, x = made(step="simplex"), torch.randn(5, 4)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(other(x), net(x))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    fresh = RungeKuttaNet(4, 3, tableau="kutta4", step="simplex")
    fresh.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(fresh(x), net(x))
    assert repr(fresh) == (
        "RungeKuttaNet(width=4, layers=3, tableau='kutta4', step='simplex', field='standard', horizon=1, skip=True, "
        "adjoint='backprop')"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adjoint", ["backprop", "discrete"])
def test_the_module_keeps_its_dtype(dtype, adjoint):
    net = made(step="simplex", adjoint=adjoint).to(dtype)
    out = net(torch.randn(5, 4).to(dtype))
    out.sum().backward()
    assert out.dtype == net.step_sizes.dtype == net.sizes.grad.dtype == dtype


def test_modules_as_activations_and_functional_calls():
    net, x = made(activation=nn.PReLU()), torch.randn(5, 4)
    loss(net(x)).backward()
    assert net.activation.weight.grad is not None
    values = {name: p.detach() for name, p in net.named_parameters()}
    slopes = torch.func.grad(lambda values: loss(torch.func.functional_call(net, values, (x,))))(values)
    for name, p in net.named_parameters():
        assert_close(slopes[name], p.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", ["fixed", "free"])
def test_autocast_reaches_the_layers_that_are_taken_again(step):
    net, x, found = made(step=step).float(), torch.randn(50, 4).float(), {}
    first = nn.Linear(4, 4).float()
    for adjoint in ("backprop", "discrete"):
        net.adjoint = adjoint
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(first(x))
        found[adjoint] = torch.autograd.grad(out.float().square().sum(), [*net.parameters()])
    for one, other in zip(*found.values(), strict=True):
        assert_close(one, other, rtol=0.05, atol=0.02 * float(other.abs().max()))


def test_what_the_discrete_adjoint_cannot_take_again():
    x = torch.randn(5, 4)
    random = made(activation=lambda z: torch.nn.functional.dropout(torch.tanh(z), 0.5), adjoint="discrete")
    with pytest.raises(ProblemError, match='draws random numbers.*expected the same function twice.*"backprop"'):
        random(x)
    slope = torch.tensor(0.3, requires_grad=True)
    captured = made(activation=lambda z: torch.tanh(slope * z), adjoint="discrete")
    with pytest.raises(ProblemError, match=r"tensor of shape \(\) that requires gradients.*expected none: use adjoint"):
        captured(x)
    with torch.no_grad():
        assert captured(x).shape == x.shape
    net = made(adjoint="discrete")
    with pytest.raises(
        OcnoptError, match='create_graph=True; the discrete adjoint gives first derivatives.*"backprop"'
    ):
        torch.autograd.grad(loss(net(x)), net.weight, create_graph=True)
    out = net(x)
    with torch.no_grad():
        net.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_by_back_propagation():
    net, x = made("kutta3"), torch.randn(2, 4, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: net(x), (x,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0; expected a whole number >= 1"),
        ({"layers": 2.5}, "layers is 2.5; expected a whole number >= 1"),
        ({"tableau": "kutta5"}, "tableau is 'kutta5'; expected .*'kutta4'.*did you mean 'kutta4'"),
        ({"step": "simplx"}, "step is 'simplx'; expected .*did you mean 'simplex'"),
        ({"field": "gradiant"}, "field is 'gradiant'; expected .*did you mean 'gradient'"),
        ({"adjoint": "continuous"}, "adjoint is 'continuous'; expected 'backprop' or 'discrete'"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected an elementwise function of a tensor"),
        ({"activation": torch.softmax}, r"activation refused a tensor \(3, 2\) .*; expected a function of one tensor"),
        ({"activation": nn.Softmax(-1)}, "activation mixes the entries of a state, or .*; expected a function of each"),
        ({"activation": nn.BatchNorm1d(2)}, "activation mixes the entries"),
        ({"activation": lambda z: z.cumsum(-1)}, "activation mixes the entries"),
        (
            {"activation": lambda z: z.sum(-1, keepdim=True)},
            r"made shape \(3, 1\) of a tensor \(3, 2\); expected the same",
        ),
        ({"activation": lambda z: None}, "made type NoneType of a tensor"),
        ({"skip": 0}, "skip is 0; expected True or False"),
        ({"horizon": 0.0}, "horizon is 0.0; expected a positive number"),
        ({"horizon": oc.FreeHorizon(1.0, 0.5, 2.0)}, "horizon is FreeHorizon.*; expected a positive number"),
        ({"width": 3, "field": "hamiltonian"}, "width is 3 with field='hamiltonian'; expected an even one"),
        ({"skip": False, "tableau": "kutta3"}, "skip=False came with tableau='kutta3'; expected 'euler'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ProblemError, match=message):
        RungeKuttaNet(**{"width": 2, "layers": 3, **options})


@pytest.mark.parametrize(
    "activation",
    [
        nn.PReLU(4).double(),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(4).double().eval(),
        torch.sign,
        lambda z: (z > 0).to(z),
        nn.Dropout(),
    ],
    ids=["prelu", "in place", "frozen statistics", "flat", "without gradients", "random"],
)
def test_what_acts_on_each_entry_alone(activation):
    with torch.no_grad():
        net = RungeKuttaNet(4, 3, activation=activation)
    assert net(torch.randn(5, 4)).shape == (5, 4)


def test_a_look_at_the_activation_draws_nothing():
    drawn = []
    for activation in (torch.tanh, nn.Dropout()):
        torch.manual_seed(0)
        drawn.append((RungeKuttaNet(2, 3, activation=activation).weight, torch.rand(1)))
    assert all(map(torch.equal, *drawn))
    with torch.device("meta"):
        assert RungeKuttaNet(2, 3).weight.is_meta


def test_wrong_inputs():
    net = RungeKuttaNet(2, 3)
    with pytest.raises(ProblemError, match=r"x has shape \(5, 3\).*expected a tensor \(\*batch, 2\), torch.float64"):
        net(torch.zeros(5, 3))
    with pytest.raises(ProblemError, match=r"torch.float32 on cpu; expected .*use x.to\(net.weight\)"):
        net(torch.zeros(5, 2).float())
    with pytest.raises(ProblemError, match=r"x has type list; expected a tensor"):
        net([[0.0, 0.0]])
    with pytest.raises(ProblemError, match=r"prune\(\) came to a network with skip=False.*expected skip=True"):
        RungeKuttaNet(2, 3, skip=False).prune()


def test_the_names_of_the_contract():
    assert oc.RungeKuttaNet is RungeKuttaNet
    assert METHODS["improved_euler"] is METHODS["heun"]
    assert METHODS["kutta4"] is METHODS["rk4"]
