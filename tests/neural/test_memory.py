"""Fields that write to memory which is not theirs to write to."""

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE

pytestmark = pytest.mark.usefixtures("float64")
METHODS = ["euler", "rk4", "dopri5", "dopri8", "heun3"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_a_slope_written_over_the_last_one_is_refused(method, mode):
    out = torch.zeros(2, 3)
    for slope in (out, out[:1], out.view(3, 2)):

        def field(t, x, slope=slope):
            return torch.mul(x, -1.0, out=slope)

        with mode(), pytest.raises(ProblemError, match="written its slope over one that it returned before"):
            NeuralODE(field, method=method)(torch.ones(slope.shape))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri8"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_slopes_written_in_turn_to_buffers_are_refused(method, mode):
    buffers, calls = [torch.zeros(2) for _ in range(3)], []

    def field(t, x):
        calls.append(t)
        with torch.no_grad():
            return buffers[len(calls) % 3].copy_(-x)

    with mode(), pytest.raises(ProblemError, match="written its slope over one that it returned before"):
        NeuralODE(field, method=method)(torch.ones(2))


def test_a_buffer_of_another_precision_is_copied_anyway():
    buffer = torch.zeros(2, dtype=torch.float32)
    with torch.no_grad():
        end = NeuralODE(lambda t, x: torch.mul(x.float(), -1.0, out=buffer), method="rk4")(torch.ones(2))
    torch.testing.assert_close(end, torch.full((2,), -1.0).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_changed_in_place_is_refused(method):
    for field in (lambda t, x: x.mul_(-1.0), lambda t, x: x[:1].fill_(0.0).expand_as(x)):
        with torch.no_grad(), pytest.raises(ProblemError, match="changes its state x in place"):
            NeuralODE(field, method=method)(torch.ones(2))
    with torch.no_grad(), pytest.raises(ProblemError, match="changes its state x in place"):
        NeuralODE(lambda t, x: (x[0].mul_(-1.0), x[1]), method=method)((torch.ones(2), torch.ones(2)))


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_as_it_is_may_be_returned_again(method):
    speed = nn.Parameter(torch.full((), 2.0))
    for field, parameters, end in (
        (lambda t, x: speed.expand_as(x), [speed], 3.0),
        (lambda t, x: x, [], torch.e),
        (lambda t, x: (-x).clone().mul_(-1.0), [], torch.e),
    ):
        ode = NeuralODE(field, parameters=parameters, method=method, **({"steps": 2000} if method == "euler" else {}))
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                torch.testing.assert_close(float(ode(torch.ones(2)).detach().mean()), float(end), rtol=2e-3, atol=0)
