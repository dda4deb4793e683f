"""What a tape cannot follow."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.runge_kutta_net import RungeKuttaNet
from tests.neural.cases import Tanh
from tests.neural.tapes import Model, N, inputs, record

pytestmark = pytest.mark.usefixtures("float64")


def written_unseen(m, x):
    x = m.a(x)
    y = m.b(x)
    functional.relu_(x)
    return m.c(x + y)


def part_written(m, x):
    x = m.a(x)
    x[:, :2].relu_()
    return m.c(x)


def part_assigned(m, x):
    x = m.a(x)
    x[:, :2] = 0.0
    return m.c(x)


def buffer_filled(m, x):
    y = torch.empty_like(x)
    y[:, :2] = m.a(x)[:, :2]
    return m.c(y)


def row_filled(m, x):
    y = torch.zeros_like(x)
    y[:, :2].add_(m.a(x)[:, :2])
    return m.c(y)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context, g):
        return 2 * context.saved_tensors[0] * g


def custom(m, x):
    return m.c(Square.apply(m.a(x)))


def custom_last(m, x):
    return Square.apply(m.a(x))


def checkpointed(m, x):
    return m.c(checkpoint(m.b, m.a(x), use_reentrant=True))


def compiled(m, x):
    return m.c(torch.compile(torch.sin, backend="aot_eager")(m.a(x)))


def of_last_time(m, x):
    m.last = m.a(x) + getattr(m, "last", 0.0)
    return m.c(m.last)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            written_unseen,
            r"'add' reads the output of 'linear', of shape \(5, 4\), which was modified in place through a",
        ),
        (
            part_written,
            r"'linear' reads the output of 'linear', .*; expected tensors .*; write x = f\(x\) for f_\(x\)|a",
        ),
        (part_assigned, r"the model writes into a tensor by x\[...\] = y, which .*; expected .*: torch.cat"),
        (buffer_filled, r"the model writes into a tensor by x\[...\] = y"),
        (
            row_filled,
            r"'linear' reads a tensor of shape \(5, 4\) made by .*, which was not seen at work; expected torch",
        ),
        (
            custom,
            r"'linear' reads a tensor of shape \(5, 4\) made by SquareBackward.*custom autograd functions, compiled",
        ),
        (custom_last, r"'end' reads a tensor of shape \(5, 4\) made by SquareBackward"),
        (checkpointed, r"made by .*CheckpointFunctionBackward.*or use feedback=False"),
        (of_last_time, r"'add.*' reads a tensor of shape \(5, 4\) made by AddBackward0, which was not seen"),
    ],
)
def test_what_cannot_be_followed_is_refused(forward, message):
    model = Model(forward)
    if forward is of_last_time:
        model(inputs())
    with pytest.raises(ProblemError, match=message):
        record(model, inputs())


@pytest.mark.parametrize(
    "inner", [NeuralODE(Tanh(N), adjoint="continuous"), RungeKuttaNet(N, 2, adjoint="discrete")], ids=["ode", "net"]
)
def test_an_adjoint_inside_is_refused(inner):
    model = nn.Sequential(nn.Linear(N, N), inner, nn.Linear(N, 2)).double()
    with pytest.raises(
        ProblemError, match='the adjoints of a NeuralODE or RungeKuttaNet .* give these adjoint="backprop"'
    ):
        record(model, inputs())
