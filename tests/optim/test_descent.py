"""What all methods of structured descent owe a user of torch.optim."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import ocnopt as oc
from ocnopt.errors import NonFiniteError, ProblemError

pytestmark = pytest.mark.usefixtures("float64")

MAKERS = {
    "conformal": lambda p: oc.optim.Conformal(p, 0.05),
    "nesterov": lambda p: oc.optim.Conformal(p, 0.05, nesterov=True),
    "relativistic": lambda p: oc.optim.Relativistic(p, 0.05, delta=0.5, alpha=0.5),
    "stiefel": lambda p: oc.optim.Riemannian(p, 0.05, momentum=0.9),
    "grassmann": lambda p: oc.optim.Riemannian(p, 0.05, momentum=0.9, manifold="grassmann", retraction="cayley"),
    "mec": lambda p: oc.optim.MEC(p, 0.05),
    "mec in flat space": lambda p: oc.optim.MEC(p, 0.2, manifold="euclidean"),
    "backtracking": lambda p: oc.optim.Backtracking(p, 0.5),
    "itoh-abe": lambda p: oc.optim.ItohAbe(p, 0.5),
    "itoh-abe on stiefel": lambda p: oc.optim.ItohAbe(p, 0.5, manifold="stiefel"),
}
GIVEN_RATE = [name for name in MAKERS if name != "backtracking"]  # which finds its own, and has no other option
GRADIENTS = [name for name in GIVEN_RATE if "itoh" not in name]
everyone = pytest.mark.parametrize("name", MAKERS)
with_gradients = pytest.mark.parametrize("name", GRADIENTS)


class Net(nn.Module):
    """Two wide matrices."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.one, self.two = (nn.Linear(n, m, bias=False, dtype=dtype) for n, m in ((4, 3), (3, 2)))

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def started(name, dtype=torch.float64):
    torch.manual_seed(0)
    net = Net(dtype)
    return net, MAKERS[name](net.parameters())


def train(net, optimizer, count, scheduler=None):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(net.one.weight)
    target = torch.roll(x[:, :2], 1, 1)
    with_closure = isinstance(optimizer, oc.optim.ItohAbe | oc.optim.Backtracking)

    def loss():
        return (net(x) - target).square().mean()

    losses = []
    for _ in range(count):
        if with_closure:
            losses.append(float(optimizer.step(loss)))
        else:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        if scheduler is not None:
            scheduler.step()
    return losses


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@everyone
def test_losses_fall(name):
    net, optimizer = started(name)
    losses = train(net, optimizer, 10 if "itoh" in name else 60)
    assert losses[-1] < 0.9 * losses[0]


@everyone
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saved_state_goes_on_bit_for_bit(name, dtype, tmp_path):
    net, optimizer = started(name, dtype)
    train(net, optimizer, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other, resumed = started(name, dtype)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    for run in ((net, optimizer), (other, resumed)):
        train(*run, 3)
    assert equal(net, other)


def pickled(objects):
    return pickle.loads(pickle.dumps(objects))  # noqa: S301


@everyone
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_go_on_bit_for_bit(name, duplicate):
    net, optimizer = started(name)
    train(net, optimizer, 2)
    copies = duplicate((net, optimizer))
    before = copy.deepcopy(net)
    train(*copies, 3)
    assert equal(net, before)
    train(net, optimizer, 3)
    assert equal(net, copies[0])


@pytest.mark.parametrize("name", GIVEN_RATE)
def test_schedulers_reach_the_step(name):
    net, optimizer = started(name)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    lr = optimizer.param_groups[0]["lr"]
    train(net, optimizer, 2, scheduler)
    assert optimizer.param_groups[0]["lr"] == lr / 4


@everyone
def test_groups_have_options_of_their_own(name):
    net = Net()
    optimizer = MAKERS[name]([{"params": [net.one.weight]}])
    optimizer.add_param_group({"params": [net.two.weight], "lr": 1e-9})
    start = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, 1)
    first, second = (float((p.detach() - old).abs().max()) for p, old in zip(net.parameters(), start, strict=True))
    assert second < 1e-6 < 1e-4 < first


@with_gradients
def test_a_closure_is_called_with_gradients_on(name):
    one, two = started(name), started(name)
    x = torch.ones(2, 4)

    def closure(net, optimizer):
        optimizer.zero_grad()
        loss = net(x).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        value = one[1].step(lambda: closure(*one))
    assert value == closure(*two)
    two[1].step()
    assert equal(one[0], two[0])


@with_gradients
def test_frozen_parameters_and_steps_without_gradients(name):
    net, optimizer = started(name)
    before = copy.deepcopy(net)
    optimizer.step()
    assert equal(net, before)
    net.one.requires_grad_(False)
    train(net, optimizer, 2)
    assert torch.equal(net.one.weight, before.one.weight)
    assert not torch.equal(net.two.weight, before.two.weight)


@with_gradients
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(name, value):
    net, optimizer = started(name)
    train(net, optimizer, 2)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    net.two.weight.grad[0, 0] = value
    with pytest.raises(NonFiniteError, match="gradients of 'parameter 1 of its group' hold NaN or infinity; expected"):
        optimizer.step()
    assert equal(net, before)
    assert same_state(optimizer.state_dict(), state)


@with_gradients
def test_finite_numbers_whose_squares_are_not_are_no_reason_to_refuse(name):
    """The sum of squares is what looks for NaN and infinity first."""
    net, optimizer = started(name, torch.float32)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.two.weight.grad[0, 0] = 1e25
    for group in optimizer.param_groups:
        group["lr"] = 1e-24
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def same_state(one, two):
    pairs = [(entries, two["state"][index]) for index, entries in one["state"].items()]
    return len(one["state"]) == len(two["state"]) and all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        for a, b in pairs
    )


@with_gradients
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_cannot_be_taken_changes_nothing(name, steps):
    """In the second group alone, after a first that could."""
    net = Net()
    optimizer = MAKERS[name]([{"params": [net.one.weight]}, {"params": [net.two.weight]}])
    train(net, optimizer, steps)
    before, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict()["state"])
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.param_groups[1]["lr"] = 1e200
    net.two.weight.grad.mul_(1e200)
    with pytest.raises(NonFiniteError, match="the step of .*parameter 0 of its group.*; expected .* Parameters and"):
        optimizer.step()
    assert equal(net, before)
    assert same_state(optimizer.state_dict(), {"state": state})


@with_gradients
def test_maximising_is_minimising_the_negative(name):
    one, two = started(name), started(name)
    one[1].param_groups[0]["maximize"] = True
    x = torch.randn(3, 4)
    for _ in range(3):
        for (net, optimizer), sign in zip((one, two), (1.0, -1.0), strict=True):
            optimizer.zero_grad()
            (sign * net(x).sin().sum()).backward()
            optimizer.step()
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=0)


@everyone
def test_options_that_nobody_reads_are_refused(name):
    group = {"params": [torch.ones(3, 1, requires_grad=True)], "name": "head", "initial_lr": 0.1}
    MAKERS[name]([group])
    with pytest.raises(ProblemError, match="has the option 'lrr'; expected options of .* did you mean 'lr'"):
        MAKERS[name]([{**group, "lrr": 0.1}])


def test_options_that_nobody_reads_are_refused_by_the_others_too():
    model = nn.Linear(2, 1)
    for kind in (oc.SNOpt, oc.OCNOpt):
        with pytest.raises(ProblemError, match="has the option 'game'; expected options of a group of"):
            kind(model, 0.1, param_groups=[{"params": model.parameters(), "game": "nash"}])


@pytest.mark.parametrize("name", GIVEN_RATE)
def test_options_that_somebody_set_are_checked_before_a_step(name):
    net, optimizer = started(name)
    before = copy.deepcopy(net)
    values = {"lr": "a", "retraction": "cayly", "manifold": "stifel", "maximize": 1}
    for key in values.keys() & optimizer.expected.keys():
        right, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], values[key]
        with pytest.raises(ProblemError, match=f"{key} of .* is {values[key]!r}; expected"):
            train(net, optimizer, 1)
        optimizer.param_groups[0][key] = right
    assert equal(net, before)


@with_gradients
def test_sparse_gradients_are_refused(name):
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = MAKERS[name](layer.named_parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ProblemError, match="the gradients of 'weight' are sparse; expected dense ones"):
        optimizer.step()


@everyone
def test_complex_parameters_are_refused(name):
    with pytest.raises(ProblemError, match="parameter 0 of its group is of torch.complex128; expected real"):
        MAKERS[name]([torch.zeros(3, 2, dtype=torch.complex128, requires_grad=True)])
    with pytest.raises(ProblemError, match=r"is of torch.int64; expected real floating-point numbers: convert it by"):
        MAKERS[name]([torch.zeros(3, 2, dtype=torch.int64)])


@pytest.mark.parametrize("name", GIVEN_RATE)
def test_the_state_of_another_optimiser_is_refused(name):
    net, optimizer = started(name)
    other = torch.optim.Adam(net.parameters())
    with pytest.raises(ProblemError, match="a group of the state lacks .*; expected the options of"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: oc.optim.Conformal(p, -1.0), "lr of Conformal is -1.0; expected a number >= 0"),
        (lambda p: oc.optim.Conformal(p, math.nan), "lr of Conformal is nan; expected a number >= 0"),
        (lambda p: oc.optim.Conformal(p, "big"), "lr of Conformal is 'big'; expected a number"),
        (
            lambda p: oc.optim.Conformal(p, 0.1, momentum=1.1),
            r"momentum of Conformal is 1.1; expected a number in \[0, 1\]",
        ),
        (lambda p: oc.optim.Conformal(p, 0.1, nesterov="yes"), "nesterov of Conformal is 'yes'; expected a bool"),
        (lambda p: oc.optim.Relativistic(p, 0.1, delta=-1), "delta of Relativistic is -1; expected a number >= 0"),
        (
            lambda p: oc.optim.Relativistic(p, 0.1, alpha=2),
            r"alpha of Relativistic is 2; expected a number in \[0, 1\]",
        ),
        (lambda p: oc.optim.ItohAbe(p, 0.0), "lr of ItohAbe is 0.0; expected a number > 0"),
        (
            lambda p: oc.optim.ItohAbe(p, 1.0, tolerance=1.0),
            r"tolerance of ItohAbe is 1.0; expected a number in \[0, 1\)",
        ),
        (
            lambda p: oc.optim.Riemannian(p, 0.1, manifold="stiefl"),
            "manifold of Riemannian is 'stiefl'.*mean 'stiefel'",
        ),
        (lambda p: oc.optim.Riemannian(p, 0.1, retraction="qf"), "retraction of Riemannian is 'qf'; expected 'qr' or"),
        (lambda p: oc.optim.MEC(p, 0.1, damping=-1), "damping of MEC is -1; expected a number >= 0"),
        (lambda p: oc.optim.MEC(p, 0.1, manifold="grassmann"), "manifold of MEC is 'grassmann'; expected 'stiefel' or"),
        (lambda p: oc.optim.Backtracking(p, 0.0), "lr of Backtracking is 0.0; expected a number > 0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ProblemError, match=message):
        make([torch.ones(2, 2, requires_grad=True)])


@with_gradients
def test_gradient_scalers_work_as_with_every_optimiser(name):
    one, two = started(name), started(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones(2, 4)
    for factor in (1.0, math.inf, 1.0):
        net, optimizer = one
        optimizer.zero_grad()
        scaler.scale(net(x).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            net, optimizer = two
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
