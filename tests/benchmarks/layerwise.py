"""A step of OCNOpt against one of Adam: CPU time, stepped in turn, and peak memory.

A step is forward pass, loss, backward pass and update. Nets: five linear layers 32 or 512 wide with tanh, batches of 32
and 128; four 3x3 convolutions of 32 channels and two linear layers on images 28x28, batch 128. Random data, float32.
"""

import itertools
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocnopt.optim.ocnopt import OCNOpt
from tests.benchmarks.memory import live_peak

WANTED_TIME, WANTED_MEMORY = 2.5, 2.0
CLASSES = 10
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Net(NamedTuple):
    """A network, its inputs, how many steps one measurement takes, and how often a repeat measures.

    Short measurements in quick alternation: a machine's speed drifts within a second.
    """

    make: Callable[[], nn.Module]
    inputs: Tensor
    steps: int
    rounds: int


class Cost(NamedTuple):
    """A way to step on a net, its time and peak memory over Adam's, and its milliseconds."""

    net: str
    way: str
    time: float
    memory: float
    milliseconds: float


def mlp(width: int) -> nn.Module:
    """Five linear layers with tanh between them."""
    sizes = [64, width, width, width, width, CLASSES]
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Four convolutions and two linear layers with ReLU between them."""
    parts: list[nn.Module] = []
    for inputs, stride in ((1, 1), (32, 2), (32, 2), (32, 1)):
        parts += [nn.Conv2d(inputs, 32, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def nets() -> dict[str, Net]:
    """Name -> net."""
    torch.manual_seed(0)
    return {
        "MLP 5 x 32, batch 32": Net(lambda: mlp(32), torch.randn(32, 64), 4, 20),
        "MLP 5 x 512, batch 128": Net(lambda: mlp(512), torch.randn(128, 64), 4, 2),
        "4 convolutions, batch 128": Net(convolutions, torch.randn(128, 1, 28, 28), 2, 1),
    }


WAYS: dict[str, Make] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
    "OCNOpt": lambda model: OCNOpt(model, lr=1e-2),
    'OCNOpt, form="sample"': lambda model: OCNOpt(model, lr=1e-2, form="sample"),
    'OCNOpt, form="gauss_newton"': lambda model: OCNOpt(model, lr=1e-2, form="gauss_newton"),
    'OCNOpt, curvature="adaptive"': lambda model: OCNOpt(model, lr=1e-3, curvature="adaptive"),
    'OCNOpt, curvature="kronecker"': lambda model: OCNOpt(model, lr=1e-2, curvature="kronecker"),
}


def stepper(net: Net, way: Make) -> Callable[[], None]:
    """Take one step of training."""
    torch.manual_seed(1)
    model = net.make()
    optimizer = way(model)
    labels = torch.randint(0, CLASSES, (len(net.inputs),))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(net.inputs), labels).backward()
        optimizer.step()

    return step


def measure(name: str, net: Net, repeats: int = 11) -> list[Cost]:
    """Every round gives a ratio of its own, and their median counts."""
    steps = {way: stepper(net, make) for way, make in WAYS.items()}
    rounds = []
    for _ in range((repeats + 1) * net.rounds):
        spent = {}
        for way, step in steps.items():
            began = process_time()
            for _ in range(net.steps):
                step()
            spent[way] = (process_time() - began) / net.steps
        rounds.append(spent)
    del rounds[: net.rounds]  # they warm up
    peaks = {way: live_peak(lambda make=make: _some(stepper(net, make))) for way, make in WAYS.items()}
    return [
        Cost(
            name,
            way,
            median(spent[way] / spent["Adam"] for spent in rounds),
            peaks[way] / peaks["Adam"],
            1e3 * median(spent[way] for spent in rounds),
        )
        for way in WAYS
    ]


def _some(step: Callable[[], None]) -> None:
    for _ in range(3):
        step()
