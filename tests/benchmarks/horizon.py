"""The integration time T on `img`: the feedback rule from three starts against a fixed T = 1.

All runs of a seed are stepped in turn from the same weights on the same batches. One setting of the policy serves both
optimisers and every start. A run that has not met the loss by then goes on for that alone, as long again at most.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from statistics import mean
from time import process_time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.ocp import FreeHorizon
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.problems import Task
from tests.benchmarks.workload import ITERATIONS, adam, batches, digits, snopt

STARTS, LOWER, UPPER = (0.3, 1.0, 2.0), 0.2, 2.0
PENALTY, EVERY = 10.0, 10
EPOCH = 11  # batches
OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda model: adam(model, lr=1e-2),
    "SNOpt": snopt,
}
Key = tuple[str, float | None]  # optimiser, start of T


class Finish(NamedTuple):
    """One run that moved T, beside the one at T = 1 by the same optimiser."""

    optimizer: str
    seed: int
    start: float
    T: float
    settled: int
    swing: float
    time_ratio: float | None
    whole_ratio: float
    evaluations: float
    fixed_evaluations: float
    accuracy: float
    fixed_accuracy: float


class Run:
    """One model with its optimiser, and its policy unless T is fixed; what each iteration cost and left."""

    def __init__(self, task: Task, optimizer: str, start: float | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.model = task.make_model(1.0 if start is None else FreeHorizon(start, LOWER, UPPER))
        self.optimizer = OPTIMISERS[optimizer](self.model)
        self.policy = None if start is None else HorizonPolicy(self.model.ode, penalty=PENALTY, every=EVERY)
        self.seconds, self.losses, self.T, self.evaluations = [0.0], list[float](), list[float](), 0

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One iteration; everything that T costs is within its time."""
        began = process_time()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        if self.policy is not None:
            self.policy.step()
            self.T.append(float(self.model.ode.T))
        self.seconds.append(self.seconds[-1] + process_time() - began)
        self.losses.append(loss.item())
        self.evaluations += self.model.ode.statistics.forward

    def time_to(self, loss: float) -> float | None:
        """CPU seconds until the mean over the last epoch is as low."""
        means = (mean(self.losses[i - EPOCH : i]) for i in range(EPOCH, len(self.losses) + 1))
        return next((self.seconds[i] for i, reached in enumerate(means, EPOCH) if reached <= loss), None)

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of test images classified right."""
        chosen = self.model(self.task.test_inputs).argmax(1)
        return (chosen == self.task.test_targets).double().mean().item()

    def swing(self) -> tuple[int, float]:
        """The iteration at which T first is within 5 % of its last value, and how far it is off from then on."""
        off = [abs(T / self.T[-1] - 1.0) for T in self.T]
        first = next(i for i, far in enumerate(off) if far <= 0.05)
        return first + 1, max(off[first:])


def measure(seed: int, iterations: int = ITERATIONS) -> list[Finish]:
    """Train by both optimisers at T = 1 and from every start."""
    task = digits()
    runs = {(name, start): Run(task, name, start, seed) for name in OPTIMISERS for start in (None, *STARTS)}
    stream = batches(task, seed)
    for batch in islice(stream, iterations):
        for run in runs.values():
            run.step(*batch)
    target, found = mean(runs["Adam", None].losses[-EPOCH:]), []
    for name in OPTIMISERS:
        fixed = runs[name, None]
        for start in STARTS:
            run = runs[name, start]
            found.append(
                Finish(
                    *(name, seed, start, run.T[-1], *run.swing(), None),
                    run.seconds[-1] / fixed.seconds[-1],
                    *(run.evaluations / iterations, fixed.evaluations / iterations),
                    *(run.accuracy(), fixed.accuracy()),
                )
            )
    times = _until(runs, target, islice(stream, iterations))
    return [
        end._replace(time_ratio=_over(times[end.optimizer, end.start], times[end.optimizer, None])) for end in found
    ]


def _until(runs: dict[Key, Run], target: float, further: Iterable[tuple[Tensor, Tensor]]) -> dict[Key, float | None]:
    """The time of each run to a loss, on further batches where need be."""
    for batch in further:
        late = [run for run in runs.values() if run.time_to(target) is None]
        if not late:
            break
        for run in late:
            run.step(*batch)
    return {key: run.time_to(target) for key, run in runs.items()}


def _over(time: float | None, reference: float | None) -> float | None:
    return None if time is None or reference is None else time / reference
