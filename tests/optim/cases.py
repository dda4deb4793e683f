"""Models and helpers shared by the tests of the optimisers."""

import torch
from torch import nn

from ocnopt.differential.kronecker import Collector, is_layer
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.optim.snopt import SNOpt


def gather(model, run, *, mean=True):
    """The samples of every layer of a model during ``run()``."""
    layers = {module: module.bias is not None for module in model.modules() if is_layer(module)}
    odes = [module for module in model.modules() if isinstance(module, NeuralODE)]
    collector = Collector(layers, {module for ode in odes for module in ode.field.modules()}, mean=mean)
    handles = [*collector.attach(), *(ode.observe(collector) for ode in odes)]
    run()
    for handle in handles:
        handle.remove()
    return collector.take()


def factors(samples):
    """A and B of the samples at one layer."""
    n = samples.inputs.shape[1]
    return samples.inputs.mT @ samples.inputs / n, samples.gradients.mT @ samples.gradients / n


class ImageField(nn.Module):
    """One convolution that sees the time."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t, x):
        return torch.tanh(self.conv(torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], 1)))


class Net(nn.Module):
    """A convolution in groups, a Neural ODE, a norm, a linear layer."""

    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, groups=2, bias=False)
        self.ode = NeuralODE(ImageField(4), **{"method": "rk4", "steps": 2, **options})
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.ode(self.stem(x)).mean((2, 3))))


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, t, x):
        return torch.tanh(self.inner(x))


class Model(nn.Module):
    """A layer, a Neural ODE whose T moves, a layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.ode = NeuralODE(Field(), FreeHorizon(1.0, 0.2, 3.0), method="rk4", steps=2)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.ode(self.stem(x)))


def loss(model, x):
    return model(x).square().sum(1).mean()


def data(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 2, 5, 5, generator=generator), torch.randint(3, (count, 5), generator=generator)


def train(model, optimizer, batches, scheduler=None):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def backward(model, x):
    model.zero_grad()
    model(x).square().sum(1).mean().backward()


def gathering(model, lr=0.01, **options):
    """An SNOpt whose factors come from samples."""
    return SNOpt(model, lr, curvature="costate", **options)
