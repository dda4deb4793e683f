"""The `img` workload: digit images, a small convolutional Neural ODE, cross-entropy, batches of 128."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.optim.snopt import SNOpt
from ocnopt.problems import Task, learning_task

BATCH = 128
ITERATIONS = 143
EVALUATE_EVERY = 5
# of Adam: what the published comparison tuned, and what a wider search found best on this split; of SNOpt
ADAM_LRS, SNOPT_LR = (3e-3, 1e-2), 1e-2

Maker = Callable[[nn.Module], torch.optim.Optimizer]


def adam(model: nn.Module, lr: float = ADAM_LRS[0]) -> torch.optim.Optimizer:
    """Adam as tuned on this workload."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def snopt(model: nn.Module, **options: Any) -> SNOpt:
    """SNOpt with its defaults."""
    return SNOpt(model, lr=SNOPT_LR, **options)


def digits() -> Task:
    """Data, model and loss."""
    return learning_task("digits").build()


def batches(problem: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, a new order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(problem.train_targets), generator=generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield problem.train_inputs[chosen], problem.train_targets[chosen]


@dataclass
class Run:
    """One model with its optimiser, and what its training cost so far."""

    problem: Task
    make_optimizer: Maker
    seed: int = 0
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: float = 0.0
    evaluations: int = 0  # of the forward passes: whether a backward pass evaluates depends on what was kept

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.problem.make_model(1.0)
        self.optimizer = self.make_optimizer(self.model)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One iteration; returns its CPU time."""
        began = process_time()
        self.optimizer.zero_grad()
        self.problem.loss(self.model(inputs), targets).backward()
        self.optimizer.step()
        spent = process_time() - began
        self.seconds += spent
        statistics = self.model.ode.statistics
        self.evaluations += statistics.forward
        return spent

    @torch.no_grad()
    def training_loss(self) -> float:
        """The loss on the whole training part."""
        return self.problem.loss(self.model(self.problem.train_inputs), self.problem.train_targets).item()

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of test images classified right."""
        chosen = self.model(self.problem.test_inputs).argmax(1)
        return (chosen == self.problem.test_targets).double().mean().item()
