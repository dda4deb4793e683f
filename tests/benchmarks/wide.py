"""Wide nets: time until the loss that Adam ends with, of SNOpt as it comes over Adam at the best of three rates."""

from collections.abc import Callable
from itertools import chain, pairwise
from statistics import mean
from time import process_time
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ocnopt as oc
from ocnopt.problems import Task, learning_task
from tests.benchmarks.race import WINDOW
from tests.benchmarks.workload import adam, batches, snopt

RATES = (1e-3, 3e-3, 1e-2)  # of Adam
PATIENCE = 2  # times of Adam's iterations, after which a run has not got there


class Net(NamedTuple):
    """A learning problem, the model, and Adam's iterations."""

    problem: str
    make_model: Callable[[], nn.Module]
    iterations: int


def plain(inputs: int, width: int) -> nn.Module:
    """Three hidden layers."""
    widths = [inputs, width, width, width]
    hidden = chain.from_iterable((nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


class _Field(nn.Module):
    """A field with one wide hidden layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, inputs))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


def ode() -> nn.Module:
    """A Neural ODE with a wide field."""
    return nn.Sequential(nn.Flatten(), oc.NeuralODE(_Field(64, 512), method="rk4", steps=3), nn.Linear(64, 10))


NETS = {
    "digits, 64-256-256-256-10": Net("digits", lambda: plain(64, 256), 120),
    "digits, 64-512-512-512-10": Net("digits", lambda: plain(64, 512), 120),
    "digits, Neural ODE, field 64-512-64": Net("digits", ode, 100),
    "MNIST at 14 x 14, 196-512-512-512-10": Net("mnist_small", lambda: plain(196, 512), 190),
}


class Found(NamedTuple):
    """Of one seed: Adam's rate, SNOpt's iterations and time to Adam's last loss, over Adam's time (None: not reached).

    ``losses`` and ``accuracies`` are of both, Adam first, after Adam's iterations.
    """

    rate: float
    iterations: int | None
    ratio: float | None
    losses: tuple[float, float]
    accuracies: tuple[float, float]


class Course:
    """A run that is stepped from outside."""

    def __init__(self, net: Net, problem: Task, seed: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        torch.manual_seed(seed)
        self.problem, self.model = problem, net.make_model()
        self.optimizer, self.batches = make(self.model), batches(problem, seed)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, count: int = 1) -> "Course":
        """Go on by some iterations."""
        for _, (inputs, targets) in zip(range(count), self.batches, strict=False):
            began = process_time()
            self.optimizer.zero_grad()
            loss = self.problem.loss(self.model(inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.seconds += process_time() - began
            self.losses.append(loss.item())
        return self

    @property
    def end(self) -> float:
        """The mean of the last losses."""
        return mean(self.losses[-WINDOW:])

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of test images classified right."""
        chosen = torch.cat([self.model(part).argmax(1) for part in self.problem.test_inputs.split(500)])
        return (chosen == self.problem.test_targets).double().mean().item()


def measure(net: Net, seed: int, iterations: int | None = None) -> Found:
    """Step Adam and SNOpt in turn, so that both meet the same machine."""
    problem, many = learning_task(net.problem).build(), iterations or net.iterations
    rate = min(RATES, key=lambda rate: Course(net, problem, seed, lambda m: adam(m, rate)).step(many).end)
    other, own = (Course(net, problem, seed, make) for make in (lambda m: adam(m, rate), snopt))
    seconds = []
    for _ in range(many):
        other.step()
        seconds.append(own.step().seconds)
    losses, accuracies = (other.end, own.end), (other.accuracy(), own.accuracy())
    for _ in range((PATIENCE - 1) * many if own.end > other.end else 0):
        seconds.append(own.step().seconds)
    means = [mean(own.losses[k - WINDOW : k]) for k in range(WINDOW, len(own.losses) + 1)]
    reached = next((k for k, loss in enumerate(means, WINDOW) if loss <= other.end), None)
    ratio = None if reached is None else seconds[reached - 1] / other.seconds
    return Found(rate, reached, ratio, losses, accuracies)
