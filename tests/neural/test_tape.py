"""What a tape says of every edge, and of a cut that has moved, against models cut open and against differences."""

import copy
import gc
import weakref
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ocnopt.neural.players import plan
from ocnopt.neural.replay import Replay
from ocnopt.neural.tape import Slot
from tests.neural.tapes import MODELS, B, Model, N, inputs, loss, record, tensors

pytestmark = pytest.mark.usefixtures("float64")


def run(tape, order, given, cut=None, at=None):
    """The calls of a tape again by the simplest of interpreters; ``at`` a place, slots are replaced by others."""
    values = {}

    def fill(value):
        if isinstance(value, Slot):
            return values[value.index]
        return type(value)(map(fill, value)) if isinstance(value, (list, tuple)) else value

    for place, index in enumerate(order):
        if place == at:
            values.update(cut)
        call = tape.calls[index]
        if call.noise is not None:
            torch.set_rng_state(call.noise[0])
        args = [
            value.clone() if call.is_inplace and isinstance(value, torch.Tensor) else value
            for value in map(fill, call.args)
        ]
        made = tensors(call.function(*args, **{name: fill(value) for name, value in call.kwargs.items()}))
        values.update({slot: value for slot, value in zip(call.outputs, made, strict=True) if slot is not None})
    return values


@pytest.mark.parametrize("name", MODELS)
def test_what_is_felt_on_every_cut(name):
    """The loss's derivative along a random change of every cut, edge by edge, by central differences."""
    model, x = MODELS[name], inputs()
    torch.manual_seed(3)
    tape, output = record(model, x)
    loss(output).sum().backward()
    read = plan(tape)
    assert read.players or name in ("twice", "gain")
    starts = [(read.places[player.call], cut) for player, cut in zip(read.players, read.cuts, strict=True)]
    with torch.no_grad(), tape.surroundings.restored():
        old = run(tape, read.order, x)
        for at, cut in starts:
            change = {slot: torch.randn_like(old[slot]) for slot in cut}

            def value(h, at=at, change=change):
                moved = {slot: old[slot] + h * step for slot, step in change.items()}
                values = run(tape, read.order, x, moved, at)
                return loss([values[slot] for slot in tape.returned])

            expected = (value(1e-5) - value(-1e-5)) / 2e-5
            felt = {slot: tape.felt(slot, lambda call, at=at: read.places[call] < at) for slot in cut}
            actual = sum(
                (felt[slot] * step).reshape(B, -1).sum(1) for slot, step in change.items() if felt[slot] is not None
            )
            if cut and name not in ("normed",):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
            elif cut:  # batch normalisation couples samples
                torch.testing.assert_close(actual.sum(), expected.sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_how_far_a_cut_has_moved(name):
    """All parameters move by a little; so do the outputs, and the loss as the tape says."""
    model, x = copy.deepcopy(MODELS[name]), inputs()
    tape, output = record(model, x)
    before = loss(output)
    before.sum().backward()
    read = plan(tape)
    with torch.no_grad(), tape.surroundings.restored():
        for p in model.parameters():
            p += 1e-6 * torch.randn_like(p)
        replay = Replay(tape, read.order, read.places)
        for player, cut in zip(read.players, read.cuts, strict=True):
            replay.advance(player.call)
            assert replay.moved(cut).shape == (B,)
        replay.advance(len(tape.calls))
        actual = replay.moved([*dict.fromkeys(tape.returned)])
        after = loss([replay.value(slot) for slot in tape.returned])
    torch.testing.assert_close(actual, after - before, rtol=1e-3, atol=1e-9)


def compare(model, other, *args):
    """Gradients of a recorded pass and of an ordinary one are the same."""
    state = torch.get_rng_state()
    tape, output = record(model, *args)
    loss(output).sum().backward()
    torch.set_rng_state(state)
    loss(other(*args)).sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-14)
    return tape, output


@pytest.mark.parametrize("name", MODELS)
def test_recording_changes_nothing(name):
    model, other = copy.deepcopy(MODELS[name]), copy.deepcopy(MODELS[name])
    for one in (model, other):
        one.zero_grad()
    compare(model, other, inputs())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    "wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_parametrised_weights_are_followed(wrap):
    """As many outputs as samples: the made weight is no state of samples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(N, 6), nn.Tanh(), wrap(nn.Linear(6, B)), nn.Tanh(), nn.Linear(B, 2))
    tape, _ = compare(model, copy.deepcopy(model), inputs())
    read = plan(tape)
    assert [read.players[k].parameters["weight"] is model[i].weight for k, i in ((0, 0), (-1, 4))] == [True, True]
    assert all(tape.calls[tape.maker[slot]].has_samples for cut in read.cuts for slot in cut)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, N)
        self.lstm = nn.LSTM(N, N, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(N, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        x, _ = self.lstm(self.table(x))
        x, _ = self.attention(x, x, x)
        return self.head(x[:, -1])


def test_recurrent_layers_and_attention_are_calls():
    model, x = Recurrent(), torch.randint(7, (B, 3))
    tape, output = compare(model, copy.deepcopy(model), x)
    read = plan(tape)
    assert [player.parameters["weight"] is model.head.weight for player in read.players] == [True]
    with torch.no_grad(), tape.surroundings.restored():
        replay = Replay(tape, read.order, read.places)
        replay.advance(len(tape.calls))
        assert torch.equal(replay.value(tape.returned[0]), output)  # the same masks


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_at_rest_is_the_pass_itself(name):
    model = MODELS[name]
    tape, output = record(model, inputs())
    read = plan(tape)
    with torch.no_grad(), tape.surroundings.restored():
        replay = Replay(tape, read.order, read.places)
        replay.advance(len(tape.calls))
        for slot, y in zip(tape.returned, tensors(output), strict=True):
            assert torch.equal(replay.value(slot), y)


def test_inputs_that_require_gradients():
    """Also through what does not meet a parameter first."""
    x = inputs().requires_grad_()
    forward = lambda m, x: m.b(torch.tanh(m.a((2 * x).flatten(1)))) + x.sin()  # noqa: E731
    model = Model(forward)
    _, output = record(model, x.exp())
    (actual,) = torch.autograd.grad(loss(output).sum(), x)
    (expected,) = torch.autograd.grad(loss(model(x.exp())).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_hooks_and_kept_gradients_of_the_user_work():
    """Also on a state that has been used before."""
    heard = []

    def forward(m, x):
        x = torch.tanh(m.a(x))
        y = m.b(x)
        x.register_hook(heard.append)
        x.retain_grad()
        m.kept = x
        assert x.size(0) == len(x) == B
        return m.c(x + y)

    model = Model(forward)
    _, output = record(model, inputs())
    loss(output).sum().backward()
    assert torch.equal(heard[0], model.kept.grad)
    assert heard[0].any()


class Ordered(OrderedDict):
    """A dictionary with attributes, as some libraries return."""

    @property
    def logits(self):
        return self["logits"]


def test_outputs_keep_their_kind():
    pair = namedtuple("pair", "one two")
    model = Model(lambda m, x: Ordered(logits=m.a(x), rest=pair(m.b(x), [None, "text"])))
    _, output = record(model, inputs())
    assert type(output) is Ordered
    assert type(output["rest"]) is pair
    assert output["rest"].two == [None, "text"]
    assert output.logits.shape == (B, N)


def test_a_recording_dies_with_its_graph():
    model = MODELS["three_uses"]
    tape, output = record(model, inputs())
    value = loss(output).sum()
    dead = weakref.ref(tape)
    gc.disable()
    try:
        del tape, output
        assert dead() is not None
        del value
        assert dead() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("names", [("first", "second"), ("first", "first")])
def test_backward_passes_add_up(names):
    """The gradients of two losses of one graph, and none of those that left nothing in any .grad."""
    model, x = MODELS["three_uses"], inputs()
    losses = {"first": lambda y: loss(y).sum(), "second": lambda y: y.cos().sum()}
    tape, output = record(model, x)
    for name in names:
        losses[name](output).backward(retain_graph=True)
    other, output = record(model, x)
    sum(losses[name](output) for name in names).backward()
    for slot, gradient in other.gradients.items():
        torch.testing.assert_close(tape.gradients[slot], gradient, rtol=1e-12, atol=1e-14)
        for place in range(len(tape.calls)):
            felt = [t.felt(slot, lambda call, place=place: call < place) for t in (tape, other)]
            if felt[1] is not None:
                torch.testing.assert_close(*felt, rtol=1e-12, atol=1e-13)
