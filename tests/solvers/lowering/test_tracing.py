"""The quick trace: what it follows, and that nothing can look through it or be changed by it."""

import numpy as np
import pytest
import torch
from torch.func import hessian, jvp

from ocnopt.solvers.lowering import tracing
from ocnopt.solvers.lowering.lowering import lower, scattered

F64 = torch.float64
X = torch.tensor([0.3, 0.7, -0.4, 1.2], dtype=F64)
M = torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 4) + 2 * torch.eye(4, dtype=F64)
TABLE = torch.linspace(0, 1, 30, dtype=F64).reshape(10, 3) ** 2

QUICK = {
    "a table": lambda x: TABLE[torch.tensor([1, 3])].sum(-1) * x[torch.tensor([0, 2])],
    "Jacobian by columns": lambda x: jvp(lambda z: z**3, (x,), (x,))[1],
    "Hessian": lambda x: hessian(lambda z: (z**3).sum())(x).sum(0),
    "a new tensor": lambda x: x.new_tensor([1.0, 2.0, 3.0, 4.0]) * x,
}


@pytest.mark.parametrize("name", QUICK)
def test_what_is_traced_quickly(name, monkeypatch):
    monkeypatch.setattr(tracing, "_export", None)
    lowered = lower(QUICK[name], scattered([X]), "dynamics").function()
    np.testing.assert_allclose(lowered(X.numpy()).full()[:, 0], QUICK[name](X).numpy(), rtol=1e-12)


LOOKS = {
    "a branch": lambda x: x if x.sum() > 0 else -x,
    "a branch on a capture": lambda x: x if M.sum() > 0 else -x,
    "a number": lambda x: x * float(x[0]),
    "a list": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * x.numpy()[0],
    "a mask": lambda x: x[x > 0],
    "equality": lambda x: x if torch.equal(x, X) else -x,
    "memory": lambda x: x * x.untyped_storage()[0],
    "random numbers": lambda x: x * torch.rand(4),
    "a write": lambda x: (M[0].add_(1.0), x)[1],
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_quick_trace_shows_no_values_and_changes_nothing(name):
    before, state, function = M.clone(), torch.get_rng_state(), LOOKS[name]
    with pytest.raises((tracing._NotQuickError, RuntimeError)):
        tracing._quick(function, [X], "dynamics", F64)
    assert torch.equal(M, before)
    assert torch.equal(torch.get_rng_state(), state)
