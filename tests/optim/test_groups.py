"""Groups of convolutions, gates of cells and projections of attention move as matrices of their own."""

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError
from ocnopt.optim.snopt import SNOpt

pytestmark = pytest.mark.usefixtures("float64")

# Module, the names of a parameter that holds several matrices and of their biases, how many it holds. With its bias
# each is square, or has a wide side: one gradient has the rank of all that is kept, no eigenvector is made by rounding.
CASES = {
    "convolution": (lambda: nn.Conv1d(6, 15, 2, groups=3), "weight", "bias", 3),
    "depthwise": (lambda: nn.Conv1d(4, 12, 3, groups=4, bias=False), "weight", None, 4),
    "tall": (lambda: nn.Conv1d(4, 26, 2, groups=2, bias=False), "weight", None, 2),
    "flat": (lambda: nn.Conv1d(26, 8, 1, groups=2, bias=False), "weight", None, 2),
    "cell": (lambda: nn.GRUCell(3, 7), "weight_hh", None, 3),
    "attention": (lambda: nn.MultiheadAttention(6, 2), "in_proj_weight", None, 3),
}


class Part(nn.Module):
    """One matrix, and its bias if there is one."""

    def __init__(self, weight, bias):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.layer = nn.Linear(columns, rows, bias=bias is not None)
        with torch.no_grad():
            self.layer.weight.copy_(weight.reshape(rows, columns))
            if bias is not None:
                self.layer.bias.copy_(bias)


@pytest.mark.parametrize("widest", [160, 5, 2])
@pytest.mark.parametrize("case", CASES)
def test_each_moves_as_a_layer_of_its_own(case, widest, monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", widest)
    monkeypatch.setattr("ocnopt.optim.bases.LEADING", 2)
    monkeypatch.setattr("ocnopt.optim.bases.BESIDE_SHORT", 3)
    torch.manual_seed(0)
    if case in ("tall", "flat"):
        widest = min(widest, 5)
        monkeypatch.setattr("ocnopt.optim.bases.WIDEST", widest)
    make, key, bias_key, count = CASES[case]
    module = make()
    weight, bias = getattr(module, key), bias_key and getattr(module, bias_key)
    biases = [None] * count if bias is None else bias.detach().chunk(count)
    parts = nn.ModuleList(map(Part, weight.detach().chunk(count), biases))
    only = [{"params": [weight] if bias is None else [weight, bias]}]
    options = {"adaptation": 0.0, "refresh_every": 4}
    optimizers = SNOpt(module, param_groups=only, **options), SNOpt(parts, **options)
    for _ in range(25):
        for i, part in enumerate(parts):
            for parameter in part.parameters():
                parameter.grad = torch.randn_like(parameter) * 1e-3**i
        weight.grad = torch.cat([part.layer.weight.grad for part in parts]).reshape(weight.shape)
        if bias is not None:
            bias.grad = torch.cat([part.layer.bias.grad for part in parts])
        for optimizer in optimizers:
            optimizer.step()
    moved = torch.cat([part.layer.weight for part in parts]).reshape(weight.shape)
    torch.testing.assert_close(weight, moved, rtol=1e-9, atol=1e-9)
    if bias is not None:
        torch.testing.assert_close(bias, torch.cat([part.layer.bias for part in parts]), rtol=1e-9, atol=1e-9)


def test_a_group_whose_gradients_begin_late_moves_by_steps_of_usual_length():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, groups=2, bias=False)
    optimizer = SNOpt(layer, 0.01)
    for k in range(40):
        start = layer.weight.detach().clone()
        layer.weight.grad = torch.randn_like(layer.weight) + 0.5
        layer.weight.grad[4:] *= k > 12
        optimizer.step()
        moved = (layer.weight.detach() - start)[4:].square().mean().sqrt()
        assert not moved if k <= 12 else 1e-3 < moved < 0.05


def test_infinite_gradients_of_several_groups_are_refused():
    layer = nn.Conv1d(4, 4, 3, groups=4, bias=False)
    optimizer = SNOpt(layer, 0.01)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    layer.weight.grad[:2] = torch.tensor([torch.inf, -torch.inf])[:, None, None]
    start = layer.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="hold NaN or infinity at step 1"):
        optimizer.step()
    assert torch.equal(layer.weight, start)
