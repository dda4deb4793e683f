"""Recordings without an optimiser, and models of many shapes."""

import torch
from torch import nn
from torch.nn import functional

from ocnopt.neural.evaluation import Surroundings
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.tape import Recorder, Tape
from tests.neural.cases import Tanh


def settled(tape):
    """Let every backward pass count."""
    torch.autograd.Variable._execution_engine.queue_callback(lambda: tape.settle(counts=True))


def record(model, *args):
    """Tape and output of a forward pass."""
    surroundings = Surroundings(model, torch.device("cpu"))
    surroundings.note_buffers()
    tape = Tape(surroundings)
    recorder = Recorder(tape, {id(p): p for p in model.parameters()}, settled)
    recorder.begin(args)
    with recorder:
        output = model(*args)
    return tape, recorder.end(output)


class Gain(nn.Module):
    """A trained factor for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(0.5 + torch.rand(channels))

    def forward(self, x):
        return x * self.gain.view(-1, *[1] * (x.ndim - 2))


B, N = 5, 4


class Model(nn.Module):
    """Three layers that a function puts together."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N) for _ in range(3))
        for name, module in modules.items():
            setattr(self, name, module)
        self.put_together = forward

    def forward(self, x):
        return self.put_together(self, x)


def chain(m, x):
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))


def skip(m, x):
    x = torch.tanh(m.a(x))
    return m.c(x + torch.tanh(m.b(x)))


def inception(m, x):
    x = torch.tanh(m.a(x))
    return torch.cat([m.b(x), torch.sin(m.c(x)), x[:, :2], x.square()], 1)


def three_uses(m, x):
    x = torch.tanh(m.a(x))
    return m.b(x) * x.sigmoid() + m.c(x)


def doubled(m, x):
    x = torch.tanh(m.a(x))
    x = x + x
    return m.c(x * torch.tanh(m.b(x)) + x * x)


def views(m, x):
    x = m.a(x).view(-1, 2, 2)
    y = x.transpose(1, 2).reshape(-1, N)
    return m.c(torch.tanh(m.b(y))) + x.mT.flatten(1)


def split(m, x):
    one, two = m.a(x).split(2, dim=1)
    three, four = torch.tanh(m.b(torch.cat([two, one], 1))).chunk(2, 1)
    five, *_ = m.c(torch.cat([three, four * two], 1)).unbind(1)
    return torch.stack([five, one[:, 0]], 1)


def in_place(m, x):
    x = m.a(x).relu_()
    y = m.b(x)
    y += x
    y = functional.leaky_relu(functional.relu(y, inplace=True) - 0.1, 0.1, True)
    return m.c(y).mul_(2.0)


def in_place_on_the_second_use(m, x):
    x = m.a(x)
    y = x + 1.0
    return m.b(x.sin_()) + m.c(y)


def gathered(m, x):
    total = torch.zeros_like(x)
    for layer in (m.a, m.b):
        x = torch.tanh(layer(x))
        total += x
    return m.c(total)


def functional_layers(m, x):
    x = torch.tanh(functional.linear(x, m.a.weight, bias=m.a.bias))
    return functional.linear(input=torch.tanh(m.b(x)), weight=m.c.weight)


def twice(m, x):
    return m.c(torch.tanh(m.a(torch.tanh(m.b(torch.tanh(m.a(x)))))))


def control_flow(m, x):
    x = torch.tanh(m.a(x))
    for layer in (m.b, m.c) if x.sum() > -1e9 else ():
        x = x + torch.tanh(layer(x))
    return x


def normed(m, x):
    return m.c(m.norm(torch.tanh(m.b(m.norm_a(m.a(x))))))


def random(m, x):
    x = functional.dropout(torch.tanh(m.a(x)), 0.5)
    x = m.drop(m.b(x)) + 0.1 * torch.randn_like(x)
    return m.c(functional.rrelu(x, training=True))


def attention(m, x):
    x = m.a(x).view(-1, 2, 2)
    return m.c(functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3).flatten(1))


def outputs(m, x):
    x = torch.tanh(m.a(x))
    return {"y": m.b(x), "more": [m.c(x), (x, 3)]}


MODELS = {
    **{f.__name__: Model(f).double() for f in (chain, skip, inception, three_uses, doubled, views, split, in_place)},
    **{f.__name__: Model(f).double() for f in (in_place_on_the_second_use, gathered, functional_layers, twice)},
    **{f.__name__: Model(f).double() for f in (control_flow, attention, outputs)},
    "normed": Model(normed, norm_a=nn.LayerNorm(N), norm=nn.BatchNorm1d(N)).double(),
    "random": Model(random, drop=nn.Dropout(0.3)).double(),
    "gain": nn.Sequential(nn.Linear(N, N), Gain(N), nn.Tanh(), nn.Linear(N, 2)).double(),
    "neural ode": Model(
        lambda m, x: m.b(m.ode(m.a(x))),
        ode=NeuralODE(Tanh(N), adjoint="backprop", method="rk4", steps=2),
    ).double(),
}


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def loss(output):
    """A loss that is the sum of the samples' own, each ``(rows)``."""
    return sum(torch.sin(y + 0.3).pow(2).reshape(len(y), -1).sum(1) for y in tensors(output))


def inputs():
    return torch.randn(B, N, generator=torch.Generator().manual_seed(5))
