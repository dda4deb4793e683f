"""OCNOpt over its life: resumed, copied, dropped, beside others, with models and loops of many kinds."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ocnopt.errors import NonFiniteError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.tape import Tape
from ocnopt.optim.ocnopt import OCNOpt
from tests.neural.cases import Tanh
from tests.optim.test_ocnopt_use import data, net, new, same, step, train

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]


def alive():
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if type(thing) is Tape}


@pytest.fixture
def tapes():
    """How many recordings there are more than before the test."""
    before = alive()
    return lambda: len(alive() - before)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.01},
        {"curvature": "adaptive", "momentum": 0.9, "form": "sample"},
        {"curvature": "kronecker", "momentum": 0.5, "damping": 1.0},
        {"curvature": "kronecker", "feedback": False, "damping": 1.0},
    ],
    ids=str,
)


@OPTIONS
@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 0), (torch.float32, 12), (torch.float64, 3), (torch.float64, 12), (torch.bfloat16, 3)],
)
def test_a_resumed_run_goes_on_bit_for_bit(options, steps, dtype):
    def batch(seed):
        x, y = data(seed=seed)
        return x.to(dtype), y

    model = new().to(dtype)
    optimizer = OCNOpt(model, 0.01, **options)
    train(model, optimizer, steps, batch=batch)
    saved = pickle.loads(pickle.dumps([model.state_dict(), optimizer.state_dict()]))  # noqa: S301
    train(model, optimizer, 5, batch=batch)
    other = new().to(dtype)
    other.load_state_dict(saved[0])
    resumed = OCNOpt(other, 0.5, **options)
    resumed.load_state_dict(saved[1])
    train(other, resumed, 5, batch=batch)
    assert same(model, other)


@OPTIONS
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_model_and_optimiser_goes_on_bit_for_bit(options, duplicate):
    model = new()
    optimizer = OCNOpt(model, 0.01, **options)
    train(model, optimizer, 3)
    other, copied = duplicate((model, optimizer))
    train(other, copied, 3)
    train(model, optimizer, 3)
    assert same(model, other)
    assert [*copied.answers] == [*optimizer.answers]


def test_a_model_copied_alone_is_no_longer_watched(tapes):
    model = net()
    optimizer = OCNOpt(model, 0.1)
    other = copy.deepcopy(model)
    other(torch.ones(2, 3)).sum().backward()
    assert not optimizer._tapes
    assert tapes() == 0


def test_an_optimiser_that_is_dropped_lets_go_of_the_model():
    model = net()
    optimizer = OCNOpt(model, 0.1)
    step(optimizer, model, torch.ones(2, 3))
    dead = weakref.ref(optimizer)
    value = model(torch.ones(2, 3)).sum()
    del optimizer
    gc.collect()
    assert dead() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    value.backward()  # a pass that it had recorded
    step(OCNOpt(model, 0.1), model, torch.ones(2, 3))


def test_a_model_that_is_dropped_is_freed():
    model = net()
    optimizer = OCNOpt(model, 0.1)
    step(optimizer, model, torch.ones(2, 3))
    dead = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert dead() is None


def test_recordings_die(tapes):
    """After a step, without a backward pass, and where the next pass comes first."""
    model = new()
    optimizer = OCNOpt(model, 0.1)
    train(model, optimizer, 2)
    assert tapes() == 0
    model(data()[0])
    assert tapes() == 0
    model.eval()
    output = model(data()[0])
    assert tapes() == 1
    del output
    assert tapes() == 0


def test_exceptions_in_the_forward_pass_leave_nothing_behind():
    model = net()
    optimizer, x = OCNOpt(model, 0.1), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    model[1].register_forward_hook(interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
    model[1]._forward_hooks.clear()
    step(optimizer, model, x)
    assert not torch.overrides._get_current_function_mode_stack()
    assert [*optimizer.answers] == ["0.weight", "2.weight"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_two_optimisers_on_one_model():
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 3)
    parts = [[{"params": one[i].parameters()}] for i in (0, 2)]
    optimizers = [OCNOpt(one, 0.1, param_groups=part) for part in parts]
    single = OCNOpt(two, 0.1, game="open_loop", form="sample", scale=0.0, terminal="squares")
    for _ in range(2):
        one(x).square().sum(1).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            assert len(optimizer.answers) == 1
        one.zero_grad()
        step(single, two, x)
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_optimiser_of_a_part():
    model = net()
    whole, part = OCNOpt(model, 0.1), OCNOpt(model[2], 0.1)
    model(torch.ones(2, 3)).sum().backward()
    whole.step()
    part.step()
    assert len(whole.answers) == 2
    assert len(part.answers) == 1


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, *, depth=1):
        return self.a(self(torch.tanh(self.b(x)), depth=0)) if depth else x.sin()


def test_a_model_that_calls_itself():
    model = Recursive()
    optimizer = OCNOpt(model, 0.1)
    step(optimizer, model, torch.randn(4, 3))
    assert [*optimizer.answers] == ["b.weight", "a.weight"]


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_parts_frozen_and_set_free(frozen):
    model = net()
    parameter = model.get_parameter(frozen).requires_grad_(False)
    optimizer, before = OCNOpt(model, 0.1), parameter.clone()
    x = torch.randn(4, 3)
    step(optimizer, model, x)
    assert torch.equal(parameter, before)
    assert len(optimizer.answers) == 2
    parameter.requires_grad_(True)
    step(optimizer, model, x)
    assert not torch.equal(parameter, before)
    parameter.requires_grad_(False)
    before = parameter.clone()
    step(optimizer, model, x)
    assert torch.equal(parameter, before)


def test_a_module_added_later_can_be_trained():
    model = net()
    optimizer = OCNOpt(model, 0.1)
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.01})
    step(optimizer, model, torch.randn(4, 3))
    assert [*optimizer.answers] == ["0.weight", "2.weight", "3.weight"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_batches_of_any_size(rows):
    model = net()
    optimizer = OCNOpt(model, 0.1)
    for count in (5, rows, 5):
        step(optimizer, model, torch.randn(count, 3))
        assert all(w.shape == (count,) for _, w in optimizer.answers.values())


def test_an_empty_batch_moves_nothing():
    model = net()
    optimizer, before = OCNOpt(model, 0.1), copy.deepcopy(model.state_dict())
    model(torch.zeros(0, 3)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Noisy(nn.Module):
    """Dropout in every form, batch normalisation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.4)

    def forward(self, x):
        x = self.drop(torch.tanh(self.norm(self.a(x))))
        x = nn.functional.alpha_dropout(self.b(x), 0.2, training=self.training) + 0.1 * torch.rand_like(x)
        return self.c(x)


def test_neither_buffers_nor_the_random_state_move_with_a_step():
    model = Noisy()
    optimizer, x = OCNOpt(model, 0.1), torch.randn(6, 3)
    model(x).square().mean().backward()
    buffers, state = copy.deepcopy([*model.buffers()]), torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, was) for now, was in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
def test_a_gradient_that_is_not_finite_changes_nothing(value, curvature):
    model = net()
    optimizer, x = OCNOpt(model, 0.1, curvature=curvature, momentum=0.5, damping=1.0), torch.randn(4, 3)
    step(optimizer, model, x)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(NonFiniteError, match=r"the gradients of .*'0.weight'.* hold NaN or infinity; expected finite"):
        step(optimizer, model, x * value)
    assert all(torch.equal(now, before[0][name]) for name, now in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(before[1])
    step(optimizer, model, x)


class Towers(nn.Module):
    """Everything whose parameters take the plain step, and a head."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normal = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.gain, self.shared, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x, _ = self.lstm(self.table(x))
        x = self.attention(x, x, x)[0].mean(1) * self.gain
        return self.head(self.shared(torch.tanh(self.shared(self.normal(x)))))


def test_all_other_parameters_take_the_plain_step():
    """One warning names them; every parameter moves."""
    model = Towers()
    before = copy.deepcopy(model)
    optimizer, x = OCNOpt(model, 0.1, terminal="gradient"), torch.randint(7, (5, 3))
    model(x).square().sum(1).mean().backward()
    with pytest.warns(UserWarning, match=r"take the plain step .*: 'gain', 'table.weight', ") as caught:
        optimizer.step()
    assert len(caught) == 1
    step(optimizer, model, x)
    assert [*optimizer.answers][-1] == "head.weight"
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(now, was), name


def test_a_neural_ode_in_the_model():
    model = nn.Sequential(nn.Linear(3, 3), NeuralODE(Tanh(3), method="rk4", steps=2), nn.Linear(3, 2))
    before = copy.deepcopy(model)
    optimizer = OCNOpt(model, 0.1)
    model(torch.randn(4, 3)).square().sum(1).mean().backward()
    with pytest.warns(UserWarning, match=r"'1.field.inner.weight', '1.field.inner.bias'"):
        optimizer.step()
    assert [*optimizer.answers] == ["0.weight", "2.weight"]
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("game", ["feedback", "cooperative", "open_loop"])
def test_a_cost_to_go_that_overflows_changes_nothing(game):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Pair().float()
    optimizer, before = OCNOpt(model, 0.1, game=game, terminal="gradient"), copy.deepcopy(model.state_dict())
    model(1e15 * torch.ones(5, 3, dtype=torch.float32)).square().sum(1).mean().backward()
    with pytest.raises(
        NonFiniteError, match="the cost-to-go holds NaN or infinity; expected finite numbers.* lower lr"
    ):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Returned(nn.Module):
    """A layer by function, whose weight passes an operation that returns it as it is."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(nn.functional.linear(x, self.layer.weight.contiguous(), self.layer.bias)))


def test_an_operation_that_returns_a_parameter_itself_leaves_no_pass_behind():
    model = Returned()
    optimizer, x = OCNOpt(model, 0.1), torch.randn(5, 3)
    for _ in range(3):
        step(optimizer, model, x)
        assert [len(v) for v, _ in optimizer.answers.values()] == [5, 5]


def test_a_step_takes_a_pass_once():
    """A graph that lives on is no second batch in the next step."""
    torch.manual_seed(0)
    model = net()
    optimizer, x = OCNOpt(model, 0.1), torch.randn(4, 3)
    kept = model(x).square().mean()
    kept.backward(retain_graph=True)
    optimizer.step()
    assert {len(w) for _, w in optimizer.answers.values()} == {4}
    step(optimizer, model, torch.randn(5, 3))
    assert {len(w) for _, w in optimizer.answers.values()} == {5}
