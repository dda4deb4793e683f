"""torchdiffeq's methods by name."""

import math

import pytest
import torch

from ocnopt.integrate import torchdiffeq_bridge

pytest.importorskip("torchdiffeq")


def test_names_are_those_of_the_installed_package():
    names = torchdiffeq_bridge.method_names()
    assert {"dopri8", "implicit_adams", "heun3"} <= set(names)
    assert set(torchdiffeq_bridge.GRID) <= set(names)


@pytest.mark.parametrize("method", ["fehlberg2", "heun3", "implicit_adams"])
@pytest.mark.parametrize("parameters", [None, ()])
def test_decay(method, parameters):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    states = torchdiffeq_bridge.integrate(
        lambda t, x: -x, x, times, method=method, rtol=1e-6, atol=1e-6, step_size=0.01, adjoint_parameters=parameters
    )
    torch.testing.assert_close(states[:, 0], torch.exp(-times[1:]), rtol=0, atol=1e-4)
    states[-1].sum().backward()
    assert float(x.grad[0]) == pytest.approx(math.exp(-1.0), abs=1e-4)
