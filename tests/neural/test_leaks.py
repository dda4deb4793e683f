"""Nothing of one pass outlives it."""

import gc

import pytest
import torch
from torch import nn

from ocnopt.neural.neural_ode import NeuralODE


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, t, x):
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("checkpoint_bytes", [0, 2**28])
@pytest.mark.parametrize("backward", [True, False])
def test_passes_leave_no_tensors_behind(method, checkpoint_bytes, backward):
    ode = NeuralODE(Field(), method=method, steps=5 if method == "rk4" else None, checkpoint_bytes=checkpoint_bytes)
    x, counts = torch.randn(4, 3), []
    for i in range(4):
        loss = ode(x).square().mean()
        if backward:
            loss.backward()
        del loss
        if i % 2:  # from the second pass on; a look through all objects takes longer than a pass
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[0]
