"""Which calls are players, and their single samples' gradients against one sample after the other."""

import pytest
import torch
from torch import nn

from ocnopt.neural import players
from ocnopt.neural.players import gradients, plan
from tests.neural.tapes import Gain, record

pytestmark = pytest.mark.usefixtures("float64")

B = 4


def image(*sizes):
    return torch.randn(B, 4, *sizes)


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3), image(7)),
    "conv1d stride, padding, dilation, groups": (
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        image(9),
    ),
    "conv1d rest of the stride": (nn.Conv1d(4, 2, 3, stride=3), image(8)),
    "conv1d same": (nn.Conv1d(4, 6, 4, padding="same", dilation=3), image(8)),
    "conv1d valid": (nn.Conv1d(4, 6, 4, padding="valid"), image(8)),
    "conv1d reflect": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), image(8)),
    "conv1d no bias": (nn.Conv1d(4, 6, 3, bias=False), image(7)),
    "conv2d": (nn.Conv2d(4, 6, 3), image(5, 6)),
    "conv2d all": (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4), image(6, 5)),
    "conv2d same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2), groups=2), image(5, 6)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), image(4, 4)),
    "conv2d replicate": (nn.Conv2d(4, 6, 3, stride=2, padding="valid", padding_mode="replicate"), image(5, 4)),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), image(4, 4)),
    "conv2d pointwise": (nn.Conv2d(4, 3, 1), image(3, 3)),
    "conv3d": (nn.Conv3d(4, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)), image(3, 4, 4)),
    "conv3d same": (nn.Conv3d(4, 2, (2, 1, 3), padding="same", groups=2), image(3, 2, 4)),
}
OTHERS = {
    "linear": (nn.Linear(4, 3), image()),
    "linear no bias": (nn.Linear(4, 3, bias=False), image()),
    "linear tokens": (nn.Linear(5, 3), image(5)),
    "linear tokens of two axes": (nn.Linear(5, 3, bias=False), image(2, 5)),
    "layer norm": (nn.LayerNorm(4), image()),
    "layer norm tokens": (nn.LayerNorm(5), image(5)),
    "layer norm several axes": (nn.LayerNorm((3, 5)), image(2, 3, 5)),
    "layer norm no bias": (nn.LayerNorm(5, bias=False), image(5)),
    "group norm": (nn.GroupNorm(2, 4), image(3, 2)),
    "group norm vectors": (nn.GroupNorm(2, 4), image()),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), image(3, 2)),
    "instance norm statistics": (nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), image(5)),
    "batch norm eval": (nn.BatchNorm2d(4).eval(), image(3, 2)),
    "batch norm eval vectors": (nn.BatchNorm1d(4).eval(), image()),
}
LAYERS = {name: (layer.double(), x.double()) for name, (layer, x) in {**CONVOLUTIONS, **OTHERS}.items()}


def found(model, layer, x):
    """Gradients at a layer, after a backward pass of sum(c out); and c."""
    tape, output = record(model, x)
    c = torch.randn_like(output)
    (c * output).sum().backward()
    player = next(
        p for p in plan(tape).players if any(q is p_ for q in p.parameters.values() for p_ in layer.parameters())
    )
    return gradients(tape, player, player.costate(tape)), c


def one_by_one(model, layer, x, c):
    """The same, sample by sample."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    each = [torch.autograd.grad((c[i : i + 1] * model(x[i : i + 1])).sum(), trained) for i in range(B)]
    return [torch.stack(rows) for rows in zip(*each, strict=True)]


def weighted(gathered, w):
    """The weighted sum of single gradients."""
    return gathered.add_weighted(w, [torch.zeros_like(rows[0]) for rows in gathered.rows])


def agree(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_single_samples(name, inner):
    layer, x = LAYERS[name]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(*([Gain(x.shape[1])] if inner else []), layer, nn.Tanh())
    model.zero_grad()
    gathered, c = found(model, layer, x)
    expected = one_by_one(model, layer, x, c)
    agree(gathered.rows, expected)
    w = torch.randn(B)
    agree(weighted(gathered, w), [torch.einsum("b,b...->...", w, rows) for rows in expected])
    agree(weighted(gathered, torch.ones(B)), [p.grad for p in layer.parameters()])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if layer.bias is not None])
def test_of_a_layer_half_frozen_the_rest_plays(name, frozen):
    layer, x = LAYERS[name]
    model = nn.Sequential(layer, nn.Tanh())
    getattr(layer, frozen).requires_grad_(False)
    try:
        tape, output = record(model, x)
        c = torch.randn_like(output)
        (c * output).sum().backward()
        (player,) = plan(tape).players
        free = {name: p for name, p in player.parameters.items() if p.requires_grad}
        assert [*free] == [{"weight": "bias", "bias": "weight"}[frozen]]
        player = player._replace(parameters=free)
        agree(gradients(tape, player, player.costate(tape)).rows, one_by_one(model, layer, x, c))
    finally:
        layer.requires_grad_(True)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.BatchNorm1d(4), image()),
        (nn.BatchNorm1d(4), image(5)),
        (nn.BatchNorm2d(4, track_running_stats=False), image(3, 2)),
        (nn.BatchNorm3d(4).eval(), image(2, 2, 2)),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), image(3, 2)),
    ],
)
def test_batch_norm_counts_what_came_out(layer, x):
    """Where samples are coupled, single gradients are those of a weight of its own for each sample."""
    layer, x = layer.double(), x.double()
    model = nn.Sequential(Gain(4), layer, nn.Tanh())
    statistics = [buffer.clone() for buffer in layer.buffers()]
    model.zero_grad()
    gathered, c = found(model, layer, x)
    shape = (B, 4, *[1] * (x.ndim - 2))
    weight, bias = torch.ones(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    for buffer, was in zip(layer.buffers(), statistics, strict=True):
        buffer.copy_(was)
    plain = nn.functional.batch_norm(
        model[0](x), layer.running_mean, layer.running_var, training=layer.training or layer.running_mean is None
    )
    (c * torch.tanh(weight * plain + bias)).sum().backward()
    agree(gathered.rows, [weight.grad.reshape(B, 4), bias.grad.reshape(B, 4)])
    agree(weighted(gathered, torch.ones(B)), [layer.weight.grad, layer.bias.grad])


def test_gradients_do_not_move_statistics():
    layer, x = nn.BatchNorm1d(4), image(5)
    tape, output = record(layer, x.double())
    output.square().sum().backward()
    before = [buffer.clone() for buffer in layer.buffers()]
    (player,) = plan(tape).players
    gradients(tape, player, player.costate(tape))
    assert all(torch.equal(now, was) for now, was in zip(layer.buffers(), before, strict=True))


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "groups": 2}], ids=str)
def test_convolutions_by_function_with_few_arguments(options):
    layer, x = nn.Conv2d(4, 6, 3, **options).double(), image(5, 5)

    class ByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.tanh(nn.functional.conv2d(x, self.layer.weight, self.layer.bias, **options))

    gathered, c = found(ByFunction(), layer, x)
    agree(gathered.rows, one_by_one(nn.Sequential(layer, nn.Tanh()), layer, x, c))


def test_of_a_convolution_with_a_made_weight_the_bias_plays():
    layer, x = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), image(5, 5)
    tape, output = record(layer, x)
    c = torch.randn_like(output)
    (c * output).sum().backward()
    (player,) = plan(tape).players
    assert [*player.parameters] == ["bias"]
    agree(gradients(tape, player, player.costate(tape)).rows, [c.sum((2, 3))])


class Branches(nn.Module):
    """Three branches on one state, one of them of two layers, then a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        deep = self.second(torch.tanh(self.first(x)))
        return self.head(torch.cat([self.a(x), self.b(x), deep], 1))


def test_layers_on_one_state_are_of_one_generation():
    model = Branches()
    tape, _ = record(model, image())
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    read = plan(tape)
    found = [(names[id(player.parameters["weight"])], player.generation) for player in read.players]
    assert found == [("stem", 1), ("first", 2), ("a", 2), ("b", 2), ("second", 3), ("head", 4)]
    assert [tape.shapes[slot][1] for slot in read.cuts[1]] == [4]
    assert sorted(tape.shapes[slot][1] for slot in read.cuts[4]) == [2, 2, 3]


class Odd(nn.Module):
    """Layers that are no players: used twice, without samples in front, of weights that are made."""

    def __init__(self):
        super().__init__()
        self.twice, self.made, self.whole = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 4)
        self.player, self.table = nn.Linear(4, 4), nn.Linear(3, 4)
        self.register_buffer("places", torch.randn(B, 3))

    def forward(self, x):
        x = self.twice(torch.tanh(self.twice(x)))
        x = nn.functional.linear(x, self.made.weight.exp(), self.made.bias)
        x = x + self.whole(x.new_ones(1)) + self.table(self.places.square())
        return self.player(x)


def test_what_is_no_player():
    """A table of as many places as there are samples is not taken for samples."""
    model = Odd()
    tape, _ = record(model, image())
    read = plan(tape)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for player in read.players for p in player.parameters.values()]
    assert found == ["made.bias", "player.weight", "player.bias"]
    assert all(tape.calls[tape.maker[slot]].has_samples for cut in read.cuts for slot in cut)


def test_a_layer_of_too_many_single_gradients_stands_aside(monkeypatch):
    model = nn.Sequential(nn.Conv1d(4, 2, 3), nn.Flatten(), nn.Linear(10, 3))
    monkeypatch.setattr(players, "LARGEST", B * model[0].weight.numel())
    tape, _ = record(model, image(7))
    assert [next(iter(player.parameters.values())) is model[2].weight for player in plan(tape).players] == [True]


def test_a_norm_over_the_samples_is_no_player():
    tape, _ = record(nn.LayerNorm((B, 4)), image())
    assert not plan(tape).players


def test_images_without_a_batch_have_no_players():
    tape, _ = record(nn.Conv2d(4, 2, 3), torch.randn(4, 5, 5))
    assert not plan(tape).players
