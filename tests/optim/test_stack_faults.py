"""Matrices in stacks: single precision at its ends, edited states, interruptions."""

import copy
import weakref

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.optim import SNOpt, matrices
from ocnopt.optim.several import Several

pytestmark = pytest.mark.usefixtures("float64")


PARTS = ("momentum_left", "momentum_core", "momentum_right")


def negated(momentum):
    return -momentum


def rotated(vectors):
    """Two of them mixed, so that they are vectors of other second moments."""
    u, v = vectors[..., 0], vectors[..., 1]
    return torch.cat([torch.stack([u + v, u - v], -1) / 2**0.5, vectors[..., 2:]], -1)


@pytest.mark.parametrize(
    ("width", "of", "key"),
    [
        *((width, "weight", key) for width in (20, 200) for key in ("momentum", "output_vectors", "input_vectors")),
        (20, "bias", "momentum"),
        ((20, 170), "bias", "momentum"),
        ((170, 20), "weight", "momentum"),
    ],
)
def test_a_state_that_is_edited_counts(width, of, key):
    edit = negated if key == "momentum" else rotated
    outputs, inputs = width if isinstance(width, tuple) else (width, width)

    def run(way):
        torch.manual_seed(0)
        layer = nn.Linear(inputs, outputs, bias=min(outputs, inputs) == 20)
        optimizer = SNOpt(layer)
        for i in range(9):
            state = optimizer.state[getattr(layer, of)]
            if i == 8 and way == "in place":
                state[key].copy_(edit(state[key]))
            elif i == 8 and way in ("put", "with nothing kept"):
                state[key] = edit(state[key])
            elif i == 8 and way == "loaded":
                saved = optimizer.state_dict()
                entry = saved["state"][[*dict(layer.named_parameters())].index(of)]
                entry[key] = edit(entry[key])
                optimizer.load_state_dict(saved)
            if i == 8 and way == "with nothing kept":
                for part in PARTS:
                    optimizer.state[layer.weight].pop(part, None)
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return torch.cat([parameter.detach().reshape(-1) for parameter in layer.parameters()])

    expected = run("with nothing kept")
    for way in ("put", "in place", "loaded"):
        torch.testing.assert_close(run(way), expected, rtol=1e-10, atol=1e-12)
    assert (run("not") - expected).norm() > 1e-5


@pytest.mark.parametrize("width", [20, 200])
def test_an_interruption_leaves_no_parts_of_another_momentum(width, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    optimizer = SNOpt(layer)
    for i in range(9):
        layer.weight.grad = torch.randn(width, width)
        if i == 7:
            with monkeypatch.context() as patch:
                patch.setattr(matrices, "changes", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            assert "momentum_core" not in optimizer.state[layer.weight]
        else:
            optimizer.step()
    state = optimizer.state[layer.weight]
    expected = state["output_vectors"].mT @ state["momentum"][None] @ state["input_vectors"]
    torch.testing.assert_close(state["momentum_core"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [20, 200])
def test_parts_of_the_momentum_are_those_of_bases_that_were_made_apart(width, monkeypatch):
    def run():
        torch.manual_seed(0)
        layer = nn.Linear(width, width, bias=False)
        optimizer = SNOpt(layer, refresh_every=4)
        for _ in range(14):
            layer.weight.grad = torch.randn(width, width)
            optimizer.step()
        return layer.weight.detach()

    expected = run()
    monkeypatch.setattr(Several, "follow", lambda _: False)  # as beside other ranks
    torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["gradient", "costate"])
def test_what_is_set_free_may_have_gone_elsewhere_meanwhile(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)).float()
    optimizer, frozen = SNOpt(model, curvature=curvature), [*model[:2].parameters()]
    for i in range(9):
        if i in (3, 5):
            for p in frozen:
                p.requires_grad_(i == 5)
        if i == 5:
            model.double()
        optimizer.zero_grad()
        model(torch.randn(7, 5, dtype=model[2].weight.dtype)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[model[0].weight]["momentum"].dtype == torch.float64
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("size", [1e-17, 1e-20, 1e-23, 1e-26, 1e-30, 1e-40])
def test_a_small_gradient_spoils_neither_its_matrix_nor_others(size):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(64, 400, 3, groups=2, bias=False), nn.Linear(288, 200), nn.Linear(200, 3)]).float()
    optimizer = SNOpt(model)
    for _ in range(6):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p) * (size if i == 0 else 1.0)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    for state in optimizer.state.values():
        for key in {"input_values", "output_values"} & state.keys():
            assert float(state[key].sum(-1).amax()) < 1.001


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("shape", [(1, 20000), (2, 2000), (2000, 2), (300, 200), (12, 5, 3)])
def test_steps_in_single_precision_have_their_length(shape, damping):
    """What a rest has is a difference of squares, and rounding where all of a gradient is in the leading part."""
    torch.manual_seed(0)
    layer = (
        nn.Conv1d(shape[0], shape[1] * shape[0], shape[2], groups=shape[0])
        if len(shape) > 2
        else nn.Linear(*shape[::-1])
    ).float()
    optimizer = SNOpt(layer, 0.01, adaptation=0.0, damping=damping)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(before)
    optimizer.step()
    rms = float((layer.weight.detach() - before).square().mean().sqrt())
    assert rms == pytest.approx(0.01 * min(1.0, 64 / min(before[0].numel(), len(before))), rel=1e-4)


def test_an_interruption_between_two_parts_of_a_state_leaves_one_to_go_on_from():
    for missing in ("step", "squares", "squares_step", "momentum"):
        torch.manual_seed(0)
        layer = nn.LayerNorm(6)
        optimizer = SNOpt(layer)
        for i in range(3):
            if i == 2:
                del optimizer.state[layer.weight][missing]
            for p in layer.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert bool(layer.weight.isfinite().all())


def test_the_step_of_each_group_has_its_length():
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, groups=2, bias=False)
    optimizer, before = SNOpt(layer, 0.01), layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(before)
    layer.weight.grad[3:] *= 5.0
    optimizer.step()
    lengths = (layer.weight.detach() - before).unflatten(0, (2, 3)).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(lengths, torch.full((2,), 0.01), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("power", [0.75, 0.95, 1.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e8])
def test_padding_makes_no_nan_without_damping(size, power):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    optimizer = SNOpt(model, damping=0.0, power=power)
    for _ in range(12):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * size
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_gradients_whose_squares_are_infinite_are_told_apart_by_their_precision():
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).float())
    optimizer = SNOpt(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e60 if p.dtype == torch.float64 else 1.0)
    optimizer.step()
    model[1].weight.grad *= 1e25
    with pytest.raises(ocnopt.NonFiniteError, match=r"of .1.weight. are infinite"):
        optimizer.step()


def test_weight_decay_may_make_squares_infinite():
    model = nn.Linear(2, 2).float()
    optimizer = SNOpt(model, weight_decay=0.1)
    torch.nn.init.constant_(model.weight, 1e21)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ocnopt.NonFiniteError, match=r"of .weight with weight decay. are infinite"):
        optimizer.step()
    assert not optimizer.state


def test_no_gradient_is_held_beyond_a_step():
    model = nn.Linear(200, 200, bias=False)
    optimizer = SNOpt(model)
    model(torch.randn(3, 200)).square().mean().backward()
    gone = weakref.ref(model.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gone() is None


@pytest.mark.parametrize("size", [1e-8, 1e-22, 1e-23, 1e-25])
def test_rows_of_very_small_gradients_make_no_nan(size):
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.zeros(16, 16, dtype=torch.float32)) for _ in range(20)])
    optimizer = SNOpt(model)
    for _ in range(12):
        for p in model:
            p.grad = torch.randn_like(p)
            p.grad[8:] *= size
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model)


@pytest.mark.parametrize("width", [6, 200])
def test_states_may_be_exchanged_before_a_layer_has_no_gradient(width):
    def run(*, copies):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        optimizer = SNOpt(layers, adaptation=0.0)
        weights = [layer.weight for layer in layers]
        for i in range(10):
            if i == 6:
                first, second = (dict(optimizer.state[weight]) for weight in weights)
                if copies:
                    first, second = copy.deepcopy((first, second))
                optimizer.state[weights[0]], optimizer.state[weights[1]] = second, first
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            weights[1].grad = None if i == 6 else weights[1].grad
            optimizer.step()
        return torch.stack([weight.detach() for weight in weights])

    torch.testing.assert_close(run(copies=False), run(copies=True), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [6, 200])
def test_a_state_may_be_given_to_another_layer_and_emptied(width):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
    optimizer = SNOpt(layers, adaptation=0.0)
    for i in range(8):
        if i == 7:  # no refresh
            optimizer.state[layers[0].weight] = optimizer.state[layers[1].weight]
            optimizer.state[layers[1].weight] = {}
            expected = optimizer.state[layers[0].weight]["output_vectors"].clone()
        for layer in layers:
            layer.weight.grad = torch.randn(width, width)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[layers[0].weight]["output_vectors"], expected, rtol=0, atol=0)
    for layer in layers:
        assert float(optimizer.state[layer.weight]["change"].norm()) > 1e-3


@pytest.mark.parametrize("width", [6, 200])
def test_steps_in_inference_mode_are_those_without_gradients(width):
    def run(mode):
        torch.manual_seed(0)
        weight = torch.randn(width, width)
        layer = nn.Linear(width, width, bias=False)
        layer.weight.data.copy_(weight)
        optimizer = SNOpt(layer)
        for _ in range(8):
            layer.weight.grad = torch.randn(width, width)
            with mode():
                optimizer.step()
        return layer.weight.detach().clone()

    torch.testing.assert_close(run(torch.inference_mode), run(torch.no_grad), rtol=1e-9, atol=1e-12)
