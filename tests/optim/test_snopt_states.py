"""Damaged states that SNOpt refuses as it loads them, and those of another moment that it takes."""

import copy
import re

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Net, backward

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {"thin": (170, 170), "wide input": (170, 3), "wide output": (3, 170), "narrow": (3, 4)}


def trained(width, **options):
    """An optimiser of one layer, with everything in its state that there may be."""
    inputs, outputs = SHAPES[width]
    layer, x = nn.Linear(inputs, outputs), torch.randn(5, inputs)
    optimizer = SNOpt(layer, **options)
    for _ in range(4):
        backward(layer, x)
        optimizer.step()
    return layer, optimizer, x


def reshaped(tensor):
    """Shapes that a tensor might have by damage."""
    found = [tensor[None], tensor.flatten(), torch.cat([tensor, tensor], -1) if tensor.ndim else tensor.expand(2)]
    found += [tensor[..., :-1], tensor.mT, tensor[:-1]] if tensor.ndim > 1 else []
    return [one.clone() for one in found if one.shape != tensor.shape]


@pytest.mark.parametrize("options", [{}, {"curvature": "costate"}])
@pytest.mark.parametrize("width", SHAPES)
def test_tensors_of_other_shapes_are_refused_by_name(width, options):
    layer, optimizer, x = trained(width, **options)
    kept, hooks, seen = copy.deepcopy(optimizer.state_dict()), len(layer._forward_hooks), set()
    for index, name in enumerate(("weight", "bias")):
        for key, tensor in kept["state"][index].items():
            for damaged in reshaped(tensor) if isinstance(tensor, torch.Tensor) else ():
                state = copy.deepcopy(kept)
                state["state"][index][key] = damaged
                shapes = rf"has shape {re.escape(str((*damaged.shape,)))}; expected {re.escape(str((*tensor.shape,)))}"
                message = rf"^{key} of '{name}' in the state {shapes}, as fits the parameter and the rest"
                if key == "momentum":
                    shapes = f"{(*damaged.shape,)} instead of {(*tensor.shape,)}"
                    message = f"of another model: {name} {re.escape(shapes)}; expected the shapes of this one"
                with pytest.raises(ProblemError, match=message):
                    optimizer.load_state_dict(state)
                seen.add(key)
    assert str(optimizer.state_dict()) == str(kept)
    assert len(layer._forward_hooks) == hooks
    assert {"momentum", "step", "change", "input_vectors", "output_values", "moments"} <= seen
    assert ({"momentum_left", "momentum_core", "momentum_right"} <= seen) == (width == "thin" and not options)
    optimizer.load_state_dict(kept)
    backward(layer, x)
    optimizer.step()


@pytest.mark.parametrize(
    ("index", "lost", "message"),
    [
        (0, ["moments"], "the state of 'weight' holds 'input_vectors', 'input_values', 'output_vectors', 'output_valu"),
        (0, ["output_vectors", "moments"], "alone; expected all of 'input_vectors', 'input_values', 'output_vectors'"),
        (1, ["squares_step"], "the state of 'bias' holds 'squares' alone; expected all of 'squares', 'squares_step'"),
        (1, ["step"], "the state of 'bias' holds 'momentum' alone; expected all of 'momentum', 'step'"),
    ],
)
def test_what_belongs_together_is_there_together(index, lost, message):
    _, optimizer, _ = trained("thin")
    state = copy.deepcopy(optimizer.state_dict())
    for key in lost:
        del state["state"][index][key]
    with pytest.raises(ProblemError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("value", "came"), [(3.0, "float"), (None, "NoneType"), (torch.ones(3, 4).long(), "torch.int64")]
)
@pytest.mark.parametrize("key", ["momentum", "step", "moments"])
def test_what_is_no_tensor_of_numbers_is_refused(key, value, came):
    _, optimizer, _ = trained("narrow")
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][key] = value
    with pytest.raises(ProblemError, match=f"^{key} of parameter 0 in the state is {came}; expected a tensor of real"):
        optimizer.load_state_dict(state)


def test_states_as_they_are_saved_are_taken():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.attention = nn.LSTM(3, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
            self.attention.out_proj.requires_grad_(False)  # is never called: a warning elsewhere
            self.scale, self.head = nn.Parameter(torch.ones(())), nn.Linear(4, 2)

        def forward(self, x):
            y, _ = self.cell(x)
            return self.head(self.scale * self.attention(y, y, y)[0])

    image = torch.randn(4, 2, 5, 5)
    for model, x in ((Cells(), torch.randn(4, 5, 3)), (Net(), image), (nn.Sequential(nn.Conv2d(2, 200, 3)), image)):
        for curvature in ("gradient", "costate", "mixed"):
            optimizer = SNOpt(model, curvature=curvature)
            for _ in range(3):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                backward(model, x)
                optimizer.step()


def test_a_learning_rate_that_is_a_tensor_is_loaded():
    layer, optimizer, x = trained("narrow")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    state, right = copy.deepcopy(optimizer.state_dict()), torch.tensor(0.02)
    for wrong in (torch.tensor(-0.02), torch.tensor([0.02])):
        state["param_groups"][0]["lr"] = wrong
        with pytest.raises(ProblemError, match=r"^lr is .*; expected a number >= 0"):
            optimizer.load_state_dict(state)
    state["param_groups"][0]["lr"] = right
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.param_groups[0]["lr"], right)
    backward(layer, x)
    optimizer.step()


@pytest.mark.parametrize("curvature", ["gradient", "mixed"])
@pytest.mark.parametrize("joins", [True, False])
def test_states_of_before_a_bias_came_or_went_are_taken(joins, curvature):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    layer.bias.requires_grad_(not joins)
    optimizer = SNOpt(layer, curvature=curvature)
    for _ in range(2):
        backward(layer, x)
        optimizer.step()
    layer.bias.requires_grad_(joins)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        backward(layer, x)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[layer.weight]["input_vectors"].shape == (1, 3 + joins, 3 + joins)


@pytest.mark.parametrize("curvature", ["gradient", "costate"])
def test_a_run_goes_on_bit_for_bit_between_the_freezing_of_a_bias_and_the_next_refresh(curvature):
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    optimizer = SNOpt(layer, curvature=curvature)
    for i in range(13):
        layer.bias.requires_grad_(i < 11)
        backward(layer, x)
        optimizer.step()
    again = copy.deepcopy(layer)
    resumed = SNOpt(again, curvature=curvature)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(12):
        for model, each in ((layer, optimizer), (again, resumed)):
            backward(model, x)
            each.step()
    assert torch.equal(layer.weight, again.weight)


def test_gradients_whose_norm_half_precision_cannot_hold_leave_a_state_that_loads():
    layer = nn.Linear(8, 4).half()
    optimizer = SNOpt(layer)
    for _ in range(3):
        for p in layer.parameters():
            p.grad = torch.full_like(p, 3e4)
        optimizer.step()
    assert optimizer.state_dict()["norms"][-1] == pytest.approx(3e4 * 6.0, rel=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
def test_layers_without_entries_stay_and_the_others_move(shape):
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(*shape)])
    optimizer, before = SNOpt(model), model[0].weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        (model[0](torch.randn(4, 3)).square().mean() + model[1](torch.randn(4, shape[0])).sum()).backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(model[0].weight, before)
