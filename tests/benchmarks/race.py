"""Time until the loss that tuned Adam ends with, for SNOpt as it comes and for tuned opponents, on six workloads.

L-BFGS sees the whole training part at every iteration, on flows with new noise at every evaluation of its line search.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from math import exp, inf, log, nan
from pathlib import Path
from statistics import mean
from time import process_time
from typing import NamedTuple

import torch

from ocnopt.errors import OcnoptError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.registry import OPTIMIZERS
from ocnopt.problems import Task, learning_task
from ocnopt.runs import write_atomically
from ocnopt.training import TrainConfig, Trainer

WINDOW = 8  # batches whose mean loss is looked at
PATIENCE = 2.5  # times of Adam's, which no opponent gets more of
MOST = 2000  # evaluations of a solve, which fields that explode pass soon


class Workload(NamedTuple):
    """A learning problem, Adam's budget, and the ratio to Adam's time that SNOpt should reach."""

    problem: str
    iterations: int
    wanted: float | None


WORKLOADS = {
    "mlp": Workload("digits_ode", 220, 0.35),
    "cnf": Workload("breast_cancer_flow", 120, 0.25),
    "circ": Workload("circles_flow", 110, 0.4),
    "img": Workload("digits", 143, 0.3),
    "rnn": Workload("japanese_vowels", 100, 0.5),
    "protein": Workload("protein", 200, None),
}
QUICK = ("mlp", "cnf")
RATES: dict[str, tuple[float, ...]] = {
    "adam": (0.003, 0.01, 0.03),
    "snopt": (0.01,),
    "soap": (0.003, 0.01, 0.03),
    "muon": (0.01, 0.03, 0.1),
    "sgd": (0.01, 0.03, 0.1),
    "lbfgs": (1.0,),
}


class Course(NamedTuple):
    """What one run went through: after each iteration the loss, the CPU time and the evaluations so far."""

    losses: list[float]
    seconds: list[float]
    evaluations: list[int]
    metric: float
    lost: bool

    @property
    def means(self) -> list[float]:
        """After each iteration the mean of the last losses."""
        return [mean(self.losses[max(0, k - WINDOW) : k]) for k in range(1, len(self.losses) + 1)]

    @property
    def time(self) -> float:
        """CPU seconds so far."""
        return self.seconds[-1] if self.seconds else 0.0

    @property
    def end(self) -> float:
        """The last mean."""
        return inf if self.lost or not self.losses else self.means[-1]

    def first(self, target: float) -> int | None:
        """The iterations until a mean of full width is as low."""
        return next((k for k, loss in enumerate(self.means, 1) if k >= WINDOW and loss <= target), None)


Key = tuple[str | float, ...]


class Kept:
    """Races that have ended, a line of a file for each, so that a measurement that was interrupted goes on.

    A race is kept as a whole, since only the times of runs that were stepped in turn can be compared.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.races = [{tuple(key): Course(*course) for key, course in json.loads(line)} for line in self.lines]

    def find(self, keys: Sequence[Key]) -> dict[Key, Course] | None:
        """The courses of a race in which all of these runs took part."""
        return next((race for race in self.races if race.keys() >= {*keys}), None)

    def add(self, race: dict[Key, Course]) -> None:
        """Remember one more."""
        self.races.append(race)
        self.lines.append(json.dumps([*race.items()]))
        if self.path is not None:
            write_atomically(self.path, "".join(f"{line}\n" for line in self.lines).encode())


class Finish(NamedTuple):
    """One optimiser on one seed: when it first was as low as Adam in the end (None: never), and where it ended."""

    optimizer: str
    lr: float
    iterations: int | None
    ratio: float | None
    loss: float
    metric: float
    evaluations: int


@cache
def task(problem: str) -> Task:
    """Data, model and loss, read once."""
    return learning_task(problem).build()


def race(
    workload: Workload, seed: int, rates: Sequence[tuple[str, float]], iterations: int, kept: Kept
) -> dict[tuple[str, float], Course]:
    """Train from the same weights, an iteration of each in turn.

    Args:
        workload: what to train.
        seed: of weights and order.
        rates: optimisers and learning rates; the times of those behind the first are limited by its own.
        iterations: of all but those whose time is up.
        kept: takes the race, which is not run again if it is there.
    """
    record, data = learning_task(workload.problem), task(workload.problem)
    keys = {pair: (workload.problem, iterations, seed, *pair) for pair in rates}
    if (found := kept.find([*keys.values()])) is not None:
        return {pair: found[key] for pair, key in keys.items()}
    courses = {pair: Course([], [], [], nan, lost=False) for pair in rates}
    first = courses[rates[0]]  # keeps its lists to the end
    runs = {pair: _start(data, record.batch_size, seed, pair, iterations, courses[pair]) for pair in rates}
    while runs:
        for pair, (trainer, steps) in [*runs.items()]:
            is_late = pair != rates[0] and courses[pair].time > PATIENCE * first.time
            if is_late and rates[0] in runs:
                continue  # until Adam has caught up
            try:
                is_over, is_lost = is_late or bool(next(steps, True)), False
            except (OcnoptError, torch.linalg.LinAlgError):
                is_over = is_lost = True
            if is_over:
                del runs[pair]
                metric = nan if is_lost else _metric(data, trainer)
                courses[pair] = courses[pair]._replace(metric=metric, lost=is_lost)
    kept.add({keys[pair]: course for pair, course in courses.items()})
    return courses


def _start(
    data: Task, batch_size: int, seed: int, pair: tuple[str, float], iterations: int, course: Course
) -> tuple[Trainer, Iterator[None]]:
    name, lr = pair
    size = len(data.train_targets) if OPTIMIZERS[name].wants_all else batch_size
    config = TrainConfig(data.name, name, lr, iterations=iterations, batch_size=size, seed=seed)
    trainer = Trainer(data, config, process_time)
    odes = [module for module in trainer.model.modules() if isinstance(module, NeuralODE)]
    for ode in odes:
        ode.max_evaluations = MOST

    def steps() -> Iterator[None]:
        while not trainer.finished:
            line = trainer.step()
            course.losses.append(line["loss"])
            course.seconds.append(line["seconds"])
            course.evaluations.append(line["forward"] + (course.evaluations or [0])[-1])
            yield

    return trainer, steps()


def _metric(data: Task, trainer: Trainer) -> float:
    """The task's first metric on the test part."""
    try:
        return next(iter(data.evaluate(trainer.model).values()))
    except OcnoptError:
        return nan


def race_all(
    workload: Workload, seeds: int, iterations: int | None = None, kept: Kept | None = None
) -> dict[str, list[Finish]]:
    """Every optimiser that is installed on every seed, at the learning rate that was best on the first.

    Args:
        workload: what to train.
        seeds: how many of them.
        iterations: the workload's own if None.
        kept: races that have ended before.
    """
    budget, kept = iterations or workload.iterations, kept or Kept()
    names = [name for name in RATES if name in OPTIMIZERS]
    pairs = [(name, lr) for name in names for lr in RATES[name]]
    found: dict[str, list[Finish]] = {name: [] for name in names}
    for seed in range(seeds):
        courses = race(workload, seed, pairs, budget, kept)
        if not seed:
            pairs = [min((p for p in pairs if p[0] == name), key=lambda pair: courses[pair].end) for name in names]
        adam = courses[pairs[0]]
        for pair in pairs:
            found[pair[0]].append(finish(pair, courses[pair], adam))
    return found


def go_on(workload: Workload, found: dict[str, list[Finish]], kept: Kept) -> list[Finish]:
    """Adam, SNOpt and the opponent that ended lowest, with three times the iterations, on the first seed."""
    rivals = [name for name in found if name not in {"adam", "snopt", "lbfgs"}]
    names = ["adam", "snopt", *([min(rivals, key=lambda name: found[name][0].loss)] if rivals else [])]
    pairs = [(name, found[name][0].lr) for name in names]
    courses = race(workload, 0, pairs, 3 * workload.iterations, kept)
    return [finish(pair, courses[pair], courses[pairs[0]]) for pair in pairs]


def repeat(workload: Workload, seeds: int, kept: Kept) -> list[Finish]:
    """SNOpt as it comes, on many seeds; ratios are of its own time."""
    pair = ("snopt", RATES["snopt"][0])
    courses = [race(workload, seed, [pair], workload.iterations, kept)[pair] for seed in range(seeds)]
    return [finish(pair, course, course) for course in courses]


def finish(pair: tuple[str, float], course: Course, adam: Course) -> Finish:
    """What came of one run, against Adam's."""
    k = course.first(adam.end)
    ratio = None if k is None else course.seconds[k - 1] / adam.time
    return Finish(*pair, k, ratio, course.end, course.metric, (course.evaluations or [0])[-1])


def geometric_mean(ratios: Sequence[float | None]) -> float:
    """Of ratios; infinite where one is missing."""
    return inf if None in ratios else exp(mean(log(ratio) for ratio in ratios if ratio))
