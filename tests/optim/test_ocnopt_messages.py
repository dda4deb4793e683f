"""What OCNOpt refuses, that it leaves everything as it was, and the models that it takes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.runge_kutta_net import RungeKuttaNet
from ocnopt.optim.ocnopt import OCNOpt

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr is -1.0; expected a number >= 0"),
        ({"lr": None}, r"lr is None; expected a number >= 0"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"weight_decay": math.inf}, r"weight_decay is inf; expected a number >= 0"),
        ({"damping": -0.1}, r"damping is -0.1; expected a number >= 0"),
        ({"decay": 1.0}, r"decay is 1.0; expected a number in \[0, 1\)"),
        ({"eps": -1e-8}, r"eps is -1e-08; expected a number >= 0"),
        ({"scale": -1.0}, r"scale is -1.0; expected a number >= 0"),
        ({"limit": 0.5}, r"limit is 0.5; expected a number >= 1"),
        ({"tikhonov": -1.0, "form": "sample"}, r"tikhonov is -1.0; expected a number >= 0"),
        ({"tikhonov": 0.1}, r"tikhonov=0.1 met form='batch'; expected form=\"sample\", .*, or tikhonov=0"),
        (
            {"form": "gauss_newton", "game": "feedback"},
            r"game='feedback' met form=\"gauss_newton\", .*; expected game=",
        ),
        ({"feedback": 1}, r"feedback is 1; expected True or False: False leaves the first-order method alone"),
        ({"curvature": "adam"}, r"curvature is 'adam'; expected 'identity' or 'adaptive' or 'kronecker'; did you"),
        ({"game": "cooperation"}, r"game is 'cooperation'; expected .*; did you mean 'cooperative'"),
        (
            {"form": "batches"},
            r"form is 'batches'; expected 'batch' or 'sample' or 'gauss_newton'; did you mean 'batch'",
        ),
        ({"terminal": "mse"}, r"terminal is 'mse'; expected 'auto' or 'gradient' or 'cross_entropy'"),
        ({"terminal": None}, r"terminal is None; expected 'auto'"),
        ({"reduction": "none"}, r"reduction is 'none'; expected 'mean' or 'sum'"),
        (
            {"param_groups": [{"params": [nn.Parameter(torch.ones(2))]}]},
            r"a tensor of shape \(2,\) that is no parameter of the model; expected parameters of the model that",
        ),
        ({"param_groups": [{"foo": 1}]}, r"a dictionary with \['foo'\], .* expected parameters .*model.head"),
        ({"param_groups": ["a"]}, r"one of the params is str\); expected parameters"),
        ({"param_groups": 5}, r"one of the params is int\); expected parameters of the model"),
        ({"param_groups": []}, r"param_groups holds no parameter; expected one at least"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ProblemError, match=message):
        OCNOpt(net(), **{"lr": 0.01, **options})


def test_a_group_that_was_refused_is_not_kept():
    model = net()
    optimizer = OCNOpt(model, 0.01, param_groups=[{"params": model[0].parameters()}])
    with pytest.raises(ProblemError, match="lr is -1.0"):
        optimizer.add_param_group({"params": model[2].parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_wrong_models():
    with pytest.raises(ProblemError, match=r"model is generator; expected the nn.Module that is trained"):
        OCNOpt(net().parameters(), 0.01)
    with pytest.raises(ProblemError, match="no trainable parameter"):
        OCNOpt(net().requires_grad_(False), 0.01)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiled_models():
    with pytest.raises(
        ProblemError, match=r"the model is compiled, .*; expected the module itself: OCNOpt\(model, lr\)"
    ):
        OCNOpt(torch.compile(net()), 0.01)
    with pytest.raises(ProblemError, match=r"the part '1' of the model is compiled"):
        OCNOpt(nn.Sequential(nn.Linear(3, 3), torch.compile(net())), 0.01)
    model = net()
    model.compile()
    with pytest.raises(ProblemError, match=r"the model is compiled"):
        OCNOpt(model, 0.01)
    OCNOpt(model, 0.01, feedback=False)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_models_are_refused():
    with pytest.raises(ProblemError, match="the model is a DistributedDataParallel; expected one that a single"):
        OCNOpt(DistributedDataParallel(net()), 0.01)


def test_several_processes_are_refused(monkeypatch):
    optimizer = OCNOpt(net(), 0.01)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for call in (lambda: OCNOpt(net(), 0.01), lambda: optimizer.step(lambda: torch.zeros(()))):
        with pytest.raises(
            ProblemError, match="torch.distributed runs 2 processes; expected one: train in one process"
        ):
            call()


def test_the_state_of_another_optimiser_is_refused():
    model = net()
    optimizer = OCNOpt(model, 0.01)
    for other in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters())):
        with pytest.raises(
            ProblemError, match=r"the state holds groups without .*'damping', .*; expected .* an OCNOpt"
        ):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ProblemError, match=r"the state holds \['0.bias', .*; expected the state of an OCNOpt: load"):
        optimizer.load_state_dict(model.state_dict())


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2))
    optimizer = OCNOpt(model, 0.01)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ProblemError, match=r"gradients of '0.weight' are sparse; expected dense ones"):
        optimizer.step()


class Net(nn.Module):
    """Returns what a function of the outputs says."""

    def __init__(self, returns):
        super().__init__()
        self.net, self.returns = net(), returns

    def forward(self, x, *, scale=1.0, more=None):
        return self.returns(scale * self.net(x if more is None else x + more["x"][0]))


class Box:
    """Something that holds a tensor."""

    def __init__(self, y):
        self.y = y


@pytest.mark.parametrize(
    ("returns", "read", "message"),
    [
        (
            lambda y: y.square().mean(),
            lambda y: y,
            r"returned tensors of shapes \[\(\)\]; expected outputs, .* outside",
        ),
        (lambda y: y.mean(0), lambda y: y.sum(), "take the plain step"),
        (lambda y: (y.square().mean(), y), lambda y: y[0], r"returned tensors of shapes \[\(\), \(4, 2\)\]"),
        (
            lambda y: [y, y[1:]],
            lambda y: y[0].sum() + y[1].sum(),
            r"tensors of shapes \[\(4, 2\), \(3, 2\)\]; expected",
        ),
        (
            Box,
            lambda y: y.y.sum(),
            r"the model returned no tensor that depends on what is trained; expected outputs, or",
        ),
    ],
    ids=["loss", "mean", "loss and outputs", "other rows", "box"],
)
def test_outputs_that_are_not_samples(returns, read, message):
    model = Net(returns)
    optimizer, before = OCNOpt(model, 0.01), copy.deepcopy(model.state_dict())
    read(model(torch.randn(4, 3))).backward()
    if "plain step" in message:
        with pytest.warns(UserWarning, match=message):
            optimizer.step()
        return
    with pytest.raises(ProblemError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("returns", "read"),
    [
        (lambda y: {"y": y, "n": 3}, lambda y: y["y"]),
        (lambda y: (y, [y.detach(), None]), lambda y: y[0]),
        (lambda y: (y[:, 0], y[:, 1]), lambda y: torch.stack(y, 1)),
        (lambda y: (y, y), lambda y: y[1]),
        (lambda y: (y.square().mean(), y), lambda y: y[1]),
    ],
    ids=["dict", "tuple and list", "columns", "twice", "loss beside"],
)
def test_outputs_in_containers(returns, read):
    one, two = Net(returns), Net(lambda y: y)
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 3)
    read(one(x)).square().sum(1).mean().backward()
    two(x).square().sum(1).mean().backward()
    for model in (one, two):
        OCNOpt(model, 0.1)  # too late to have seen the pass
    optimizers = [OCNOpt(model, 0.1, terminal="gradient") for model in (one, two)]
    for optimizer in optimizers:
        optimizer.zero_grad()
    more = {"x": [torch.zeros(3, requires_grad=True)]}
    read(one(x, scale=2.0, more=more)).square().sum(1).mean().backward()
    two(x, scale=2.0).square().sum(1).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert more["x"][0].grad.any()


def unseen_model(model, x):
    model[2](model[1](model[0](x))).sum().backward()


def by_hand(model, x):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    ("terminal", "message"),
    [
        ("cross_entropy", r"terminal='cross_entropy' met gradients at the outputs, of shape \(4, 2\), that are not"),
        ("binary_cross_entropy", r"terminal='binary_cross_entropy' met gradients .* are not those of this loss; expe"),
        (
            lambda x, p: p[:, 0],
            r"terminal returned a tensor of shape \(4,\); expected the Hessian .*, of shape \(4, 2\)",
        ),
        (lambda x, p: None, r"terminal returned NoneType; expected the Hessian of each sample's loss times p"),
    ],
)
def test_a_terminal_that_is_not_that_of_the_loss(terminal, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = OCNOpt(model, 0.1, terminal=terminal)
    (10 * model(torch.randn(4, 3)).square().sum()).backward()
    with pytest.raises(ProblemError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_terminal_that_is_not_finite():
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = OCNOpt(model, 0.1, terminal=lambda x, p: p * math.nan)
    model(torch.randn(4, 3)).square().mean().backward()
    with pytest.raises(NonFiniteError, match="terminal returned NaN or infinity; expected finite numbers"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_entries():
    model = nn.Sequential(net(), nn.Linear(2, 0))
    optimizer = OCNOpt(model, 0.1, feedback=False)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_a_terminal_for_one_of_two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.one(x), self.two(x)

    model = Two()
    optimizer = OCNOpt(model, 0.1, terminal="squares")
    sum(out.square().mean() for out in model(torch.randn(4, 3))).backward()
    with pytest.raises(ProblemError, match=r"terminal='squares' met a loss of 2 outputs of the model; expected one"):
        optimizer.step()


@pytest.mark.parametrize("way", [unseen_model, by_hand])
def test_gradients_from_elsewhere(way):
    """One warning, and the step of the first-order method."""
    model = net()
    optimizer, other = OCNOpt(model, 0.1), copy.deepcopy(model)
    way(model, torch.randn(4, 3))
    with pytest.warns(
        UserWarning, match=r"gradients that no forward and backward pass of its model .*; expected model\(x"
    ):
        optimizer.step()
    for now, was in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(now, was - 0.1 * now.grad)
    optimizer.step()


def written_input(model, x):
    value = model(x).square().mean()
    value.backward()
    x.zero_()


def written_output(model, x):
    output = model(x)
    output.square().mean().backward()
    output.detach().zero_()


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            written_input,
            r"a tensor of shape \(4, 3\) that the model was given was modified in place .*; expected inputs",
        ),
        (
            written_output,
            r"the output of 'linear', of shape \(4, 2\), was modified in place after it was used by the model's c",
        ),
    ],
)
def test_states_that_were_written_over_before_the_step(way, message):
    model = net()
    optimizer, before = OCNOpt(model, 0.01), copy.deepcopy(model.state_dict())
    way(model, torch.randn(4, 3))
    with pytest.raises(ProblemError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_passes_of_different_ways_before_one_step():
    model = Net(lambda y: y.sin() if y.sum() > 0 else y)
    optimizer = OCNOpt(model, 0.01)
    x = torch.randn(4, 3)
    with torch.no_grad():
        model.net[2].weight.zero_()
    for sign in (1.0, -1.0):
        with torch.no_grad():
            model.net[2].bias.fill_(sign)
        model(x).square().sum().backward()
    with pytest.raises(
        ProblemError, match=r"2 forward passes before one step took different ways .*; expected equal ones"
    ):
        optimizer.step()


def test_a_step_without_gradients_does_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    OCNOpt(model, 0.01).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "key"), [({"momentum": 0.9}, "momentum_buffer"), ({"curvature": "adaptive"}, "exp_avg")], ids=str
)
def test_a_network_that_was_pruned_is_refused_and_stays_as_it_is(options, key):
    net = RungeKuttaNet(2, 3, step="free").double()
    optimizer = OCNOpt(net, lr=0.1, feedback=False, **options)
    x = torch.randn(4, 2, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        net.sizes[1] = 0.0
    net.prune()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ProblemError, match=f"the {key} of .* has shape .*; expected .* made before prune"):
        step()
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
