"""Gradients of output times at places of their own: the start, and points of a grid."""

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import Horizon


@pytest.mark.parametrize("method", ["heun2", "heun3", "explicit_adams"])
def test_times_on_a_grid_of_torchdiffeq_are_refused_where_they_need_gradients(method):
    pytest.importorskip("torchdiffeq")
    x, times = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.73], dtype=torch.float64)
    ode = NeuralODE(lambda t, x: 0.7 * x + t, method=method, steps=100)
    with pytest.raises(ProblemError, match=f"times that need gradients met method='{method}'.*on a fixed grid"):
        ode(x, times.clone().requires_grad_())
    ode(x, times)
    end = times[1:].clone().requires_grad_()
    (found,) = torch.autograd.grad(ode(x, torch.cat([times[:1], end[1:]])).sum(), end)
    expected = 0.7 * ode(x, times)[-1] + times[-1]
    torch.testing.assert_close(
        found[1:], expected, rtol=1e-2, atol=0
    )  # the last step of explicit_adams is of low order


def test_a_first_time_that_is_the_start_moves_the_start():
    x, delay = torch.ones(1, dtype=torch.float64), 1e-5
    tight = {"rtol": 1e-11, "atol": 1e-11}
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)

    def field(t, x):
        return 0.7 * x + t

    (found,) = torch.autograd.grad(NeuralODE(field, **tight)(x, times).sum(), times)
    ends = [NeuralODE(field, Horizon(t0, 1.0), **tight)(x, [t0, 0.5, 1.0]).sum() for t0 in (-delay, delay)]
    torch.testing.assert_close(found[0], (ends[1] - ends[0]) / (2 * delay), rtol=1e-6, atol=0)
