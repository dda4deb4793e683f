"""OCNOpt in a user's hands: against torch's own methods, accumulated, scaled, resumed, copied, dropped."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ocnopt.optim.game import GAMES
from ocnopt.optim.ocnopt import OCNOpt

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]


class Residual(nn.Module):
    """Convolutions with a projection beside them, a norm, a linear layer."""

    def __init__(self, inplace=False, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = norm(4) if norm is nn.BatchNorm2d else norm(2, 4)
        self.branch, self.skip = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.relu, self.drop, self.inplace = nn.ReLU(inplace=inplace), nn.Dropout(0.0), inplace
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.branch(x)
        if self.inplace:
            y += self.skip(x)
        else:
            y = y + self.skip(x)
        return self.head(self.drop(self.relu(y)).mean((2, 3)))


def data(count=8, seed=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def new(**options):
    torch.manual_seed(2)
    return Residual(**options)


def step(optimizer, model, *args):
    optimizer.zero_grad()
    value = model(*args).square().sum(1).mean()
    value.backward()
    optimizer.step()
    return value.item()


def test_a_learning_rate_as_a_tensor():
    x, ends = torch.randn(4, 1, 6, 6), []
    for rate in (0.05, torch.tensor(0.05)):
        model = new()
        optimizer = OCNOpt(model, 0.1, terminal="squares")
        optimizer.param_groups[0]["lr"] = rate
        step(optimizer, model, x)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model, optimizer, count, scheduler=None, batch=data):
    losses = []
    for k in range(count):
        x, y = batch(seed=k % 3)
        optimizer.zero_grad()
        value = cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    return losses


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def differ(one, two):
    """The largest relative difference of two models' parameters."""
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


PLAIN = [
    ("identity", {}, torch.optim.SGD, {}),
    ("identity", {"momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    ("identity", {"weight_decay": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
    (
        *("identity", {"momentum": 0.9, "weight_decay": 0.1}),
        *(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ),
    ("adaptive", {"momentum": 0.9}, torch.optim.Adam, {}),
    ("adaptive", {"decay": 0.9, "eps": 1e-4}, torch.optim.Adam, {"betas": (0.0, 0.9), "eps": 1e-4}),
    (
        "adaptive",
        {"momentum": 0.3, "weight_decay": 0.1},
        torch.optim.Adam,
        {"betas": (0.3, 0.999), "weight_decay": 0.1},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("curvature", "options", "base", "theirs"), PLAIN)
def test_without_feedback_it_is_the_first_order_method_bit_for_bit(curvature, options, base, theirs, dtype):
    one, two = new().to(dtype), new().to(dtype)
    ours = OCNOpt(one, 0.01, curvature=curvature, feedback=False, **options)
    batch = lambda seed: (data(seed=seed)[0].to(dtype), data(seed=seed)[1])  # noqa: E731
    assert train(one, ours, 12, batch=batch) == train(two, base(two.parameters(), 0.01, **theirs), 12, batch=batch)
    assert same(one, two)


@pytest.mark.parametrize(("curvature", "options", "base", "theirs"), PLAIN[3:5])
def test_so_it_is_with_groups_and_schedulers(curvature, options, base, theirs):
    def groups(model):
        late = {"params": [model.stem.weight, model.head.bias], "lr": 0.002, "weight_decay": 0.3}
        chosen = {id(p) for p in late["params"]}
        return [{"params": [p for p in model.parameters() if id(p) not in chosen]}, late]

    one, two = new(), new()
    ours = OCNOpt(one, 0.01, curvature=curvature, feedback=False, param_groups=groups(one), **options)
    other = base(groups(two), 0.01, **theirs)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.05], 40, cycle_momentum=False) for o in (ours, other)]
    train(one, ours, 30, schedules[0])
    train(two, other, 30, schedules[1])
    assert same(one, two)


@pytest.mark.parametrize(("form", "game"), [*product(("batch", "sample"), GAMES), ("gauss_newton", "cooperative")])
@pytest.mark.parametrize(("curvature", "lr"), [("identity", 0.5), ("adaptive", 0.02), ("kronecker", 0.1)])
def test_every_form_lowers_the_loss(curvature, lr, form, game):
    model = new(inplace=True)
    optimizer = OCNOpt(model, lr, curvature=curvature, form=form, game=game)
    losses = train(model, optimizer, 12, batch=lambda seed: data())
    assert losses[-1] < 0.95 * losses[0]
    assert [*optimizer.answers] == ["stem.weight", "norm.weight", "branch.weight", "skip.weight", "head.weight"]
    for v, w in optimizer.answers.values():
        assert v.shape == w.shape == (8,)
        assert ((w >= 0) & (w <= 2)).all()


def test_published_layers_without_feedback_take_the_plain_step():
    one, two = new(), new()
    train(one, OCNOpt(one, 0.1, form="sample", game="open_loop"), 5)
    train(two, OCNOpt(two, 0.1, feedback=False), 5)
    assert differ(one, two) < 1e-12


def test_in_place_operations_change_nothing():
    one, two = new(inplace=True), new()
    train(one, OCNOpt(one, 0.1), 5)
    train(two, OCNOpt(two, 0.1), 5)
    assert differ(one, two) < 1e-12


def test_groups_schedulers_and_clipping_with_feedback():
    model = new()
    groups = [
        {"params": model.head.parameters(), "lr": 0.3},
        {"params": [*model.stem.parameters(), model.branch.weight]},
    ]
    optimizer = OCNOpt(model, 0.1, param_groups=groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    before = copy.deepcopy(model)
    losses = train(model, optimizer, 12, schedule, batch=lambda seed: data())
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.003)
    assert torch.equal(model.branch.bias, before.branch.bias)  # in no group
    assert torch.equal(model.skip.weight, before.skip.weight)
    x, y = data()
    cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def test_weight_and_bias_of_different_groups_both_move():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = OCNOpt(model, 0.1, param_groups=[{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}])
    with pytest.warns(UserWarning, match="take the plain step of the first-order method: 'bias'"):
        step(optimizer, model, torch.randn(4, 3))
    assert not torch.equal(model.weight, before.weight)
    torch.testing.assert_close(model.bias, before.bias - 0.01 * model.bias.grad)


@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
@pytest.mark.parametrize("form", ["batch", "sample", "gauss_newton"])
def test_several_passes_are_one_batch(form, curvature):
    one, two = new(norm=nn.GroupNorm), new(norm=nn.GroupNorm)
    options = {"form": form, "curvature": curvature, "reduction": "sum", "terminal": "cross_entropy", "damping": 1.0}
    optimizers = [OCNOpt(model, 0.001, **options) for model in (one, two)]
    for k in range(3):
        x, y = data(seed=k)
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(one(x), y, reduction="sum").backward()
        for part in (slice(0, 3), slice(3, 8)):
            cross_entropy(two(x[part]), y[part], reduction="sum").backward()
        for optimizer in optimizers:
            optimizer.step()
    assert differ(one, two) < 1e-10


def test_several_passes_in_one_backward_pass():
    one, two = new(norm=nn.GroupNorm), new(norm=nn.GroupNorm)
    optimizers = [OCNOpt(model, 0.01, reduction="sum") for model in (one, two)]
    x, y = data()
    cross_entropy(one(x), y, reduction="sum").backward()
    sum(cross_entropy(two(a), b, reduction="sum") for a, b in zip(x.split(3), y.split(3), strict=True)).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert differ(one, two) < 1e-10


def threw_away_none(model, x, y):
    cross_entropy(model(2 * x), y).backward()
    model.zero_grad()


def threw_away_zeros(model, x, y):
    cross_entropy(model(2 * x), y).backward()
    model.zero_grad(set_to_none=False)


def evaluated(model, x, y):
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model.eval()
    model(x)
    model.train()


def looked_at_the_input(model, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(cross_entropy(model(x), y), x)


def failed(model, x, y):
    with pytest.raises(RuntimeError):
        model(x[..., 0])
    with pytest.raises(TypeError):
        model(x, y)


def differentiated_functions(model, x, y):
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: cross_entropy(torch.func.functional_call(model, p, x), y))(parameters)


BETWEEN = pytest.mark.parametrize(
    "between",
    [threw_away_none, threw_away_zeros, evaluated, looked_at_the_input, failed, differentiated_functions],
    ids=lambda f: f.__name__,
)


@BETWEEN
@pytest.mark.parametrize("late", [False, True])
def test_only_what_is_in_grad_counts(between, late):
    """Whatever ran before the pass; or after it, where it leaves the gradients alone."""
    if late and between.__name__.startswith("threw"):
        pytest.skip("gradients are gone")
    one, two = new(norm=nn.GroupNorm), new(norm=nn.GroupNorm)
    optimizers = OCNOpt(one, 0.1), OCNOpt(two, 0.1)
    x, y = data()
    for _ in range(2):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            if model is one and not late:
                between(model, x, y)
            cross_entropy(model(x), y).backward()
            if model is one and late:
                between(model, x, y)
            optimizer.step()
    assert same(one, two)
    assert len(one.state_dict()) == len(two.state_dict())


def test_a_pass_repeated_after_zero_grad_counts_once():
    one, two = new(norm=nn.GroupNorm), new(norm=nn.GroupNorm)
    optimizers = OCNOpt(one, 0.1), OCNOpt(two, 0.1)
    x, y = data()
    value = cross_entropy(one(x), y)
    value.backward(retain_graph=True)
    one.zero_grad()
    value.backward()
    cross_entropy(two(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert same(one, two)


def test_two_losses_of_one_pass_add_up():
    one, two = new(norm=nn.GroupNorm), new(norm=nn.GroupNorm)
    optimizers = OCNOpt(one, 0.1), OCNOpt(two, 0.1)
    x, y = data()
    output = one(x)
    cross_entropy(output, y).backward(retain_graph=True)
    output.square().sum(1).mean().backward()
    output = two(x)
    (cross_entropy(output, y) + output.square().sum(1).mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert differ(one, two) < 1e-12


def test_a_gradient_penalty_counts_once():
    """The first derivative reaches no parameter: what it felt on the way is not the loss."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = OCNOpt(model, 0.1)
    x = torch.randn(5, 3, requires_grad=True)
    output = model(x)
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    (0.0 * slope.square().sum() + output.square().sum(1).mean()).backward()
    (tape,) = optimizer._tapes
    (last,) = tape.returned
    torch.testing.assert_close(tape.gradients[last], 2 * output.detach() / 5)
    assert not tape.gradients[last].requires_grad
    optimizer.step()


def test_closures():
    one, two = new(), new()
    optimizers = OCNOpt(one, 0.1), OCNOpt(two, 0.1)
    x, y = data()

    def closure():
        optimizers[0].zero_grad()
        value = cross_entropy(one(x), y)
        value.backward()
        return value

    for _ in range(3):
        value = optimizers[0].step(closure)
        optimizers[1].zero_grad()
        expected = cross_entropy(two(x), y)
        expected.backward()
        optimizers[1].step()
        assert value.item() == expected.item()
    assert same(one, two)
