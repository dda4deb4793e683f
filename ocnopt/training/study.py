"""A study: methods x learning rates x seeds on one or more tasks, each run with a folder of its own.

The runs of one task and seed are stepped in turn in one process, so that their times can be compared; the pairs of task
and seed are spread over processes. A run that was killed goes on from its checkpoint, so a study does.

    <folder>/<problem>-<method>-lr<rate>-seed<seed>/    a run folder each
    <folder>/metrics.jsonl                              one line a run, written at the end
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ocnopt.errors import DataError
from ocnopt.optim.registry import optimizer
from ocnopt.problems import LearningRecord, learning_task
from ocnopt.runs import CONFIG, METRICS, RunFolder
from ocnopt.training.metrics import Metrics, last_loss
from ocnopt.training.trainer import TrainConfig, open_trainer, train

SPAN = (0.1, 0.3, 1.0, 3.0)  # a factor of 30


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        optimizer: its name.
        horizon: rule for T, see :class:`ocnopt.training.trainer.TrainConfig`.
        model: options of the problem's model.
        lr: learning rate; the problem's tuned one, else the optimiser's own, if None.
        title: in tables and legends; made of the rest if empty.
        variant: a word that tells it from others by the same optimiser.
        settings: further fields of :class:`ocnopt.training.trainer.TrainConfig`, such as ``options``.
    """

    optimizer: str
    horizon: str = "fixed"
    model: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    title: str = ""
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For folders.

        Example:
            >>> Method("snopt", "feedback").name
            'snopt-feedback'
            >>> Method("snopt", variant="power 1/2").name
            'snopt-power-1-2'
        """
        words = (re.sub(r"[^\w.]+", "-", self.variant), "" if self.horizon == "fixed" else self.horizon)
        return "-".join([self.optimizer, *filter(None, words), *map(str, self.model.values())])

    @property
    def label(self) -> str:
        """For readers.

        Example:
            >>> Method("snopt", "feedback").label
            'SNOpt + feedback T'
        """
        rule = "" if self.horizon == "fixed" else f"+ {self.horizon} T"
        words = filter(None, [optimizer(self.optimizer).label, self.variant, rule])
        return self.title or " ".join([*words, *map(str, self.model.values())])


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        name: in the registry.
        summary: one line for a table.
        problems: names of learning problems.
        methods: the first is the one that others are measured against.
        factors: of every method's own learning rate.
        seeds: 0, 1, ... up to this number of them.
        epochs: of every run; the problem's own if None.
        batch_size: the problem's own if None.
        iterations: of every run, instead of epochs.
        left_out: a sentence on the methods that are missing here; empty if none is.
    """

    name: str
    summary: str
    problems: tuple[str, ...]
    methods: tuple[Method, ...]
    factors: tuple[float, ...] = (1.0,)
    seeds: int = 5
    epochs: int | None = None
    batch_size: int | None = None
    iterations: int | None = None
    left_out: str = ""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Study":
        """A study that JSON has kept.

        Args:
            entry: ``dataclasses.asdict`` of a study, with lists for tuples.
        """
        tuples = {key: tuple(entry[key]) for key in ("problems", "factors")}
        return cls(**{**entry, **tuples, "methods": tuple(Method(**method) for method in entry["methods"])})

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """The learning rate that the factors multiply, by problem and method."""
        known = {problem: learning_task(problem) for problem in self.problems}
        return {p: {method.name: _rate(record, method) for method in self.methods} for p, record in known.items()}

    def quick(self) -> "Study":
        """The same on two seeds, two learning rates and one epoch, or one in fifteen of the study's own epochs."""
        epochs = max(1, (self.epochs or 0) // 15)
        return replace(self, seeds=min(self.seeds, 2), factors=self.factors[1:3] or self.factors, epochs=epochs)

    def configs(self, problem: str, samples: int, seed: int) -> list[tuple[Method, TrainConfig]]:
        """The runs of one task and seed.

        Args:
            problem: one of the study's.
            samples: of its training part.
            seed: of weights and order.
        """
        record = learning_task(problem)
        size = self.batch_size or record.batch_size
        epoch = max(1, samples // size)
        iterations = self.iterations or epoch * (self.epochs or record.epochs)
        whole = self.batch_size is None
        return [
            (
                method,
                TrainConfig(
                    problem=problem,
                    optimizer=method.optimizer,
                    lr=float(f"{factor * _rate(record, method):.6g}"),
                    horizon=method.horizon,
                    iterations=iterations,
                    batch_size=samples if whole and optimizer(method.optimizer).wants_all else size,
                    checkpoint_every=max(20, epoch),
                    seed=seed,
                    model=dict(method.model),
                    **method.settings,
                ),
            )
            for method in self.methods
            for factor in self.factors
        ]


@dataclass(frozen=True)
class Outcome:
    """What one method reached with one learning rate.

    Args:
        problem: name of the task.
        method: how it was trained.
        config: of the first seed.
        window: iterations of an epoch, or all where there are fewer.
        runs: the metrics of each seed; one that diverged has fewer lines than iterations.
    """

    problem: str
    method: Method
    config: TrainConfig
    window: int
    runs: Sequence[Metrics]

    @property
    def losses(self) -> list[float]:
        """The mean loss of each seed's last epoch; infinite where it diverged."""
        whole = self.config.iterations
        return [last_loss(run, self.window) if len(run) == whole else inf for run in self.runs]

    @property
    def loss(self) -> float:
        """Mean of the losses over the seeds."""
        return mean(self.losses)

    def ends(self, name: str) -> list[float]:
        """The last value of a metric in every run that came to its end.

        Args:
            name: of the metric.
        """
        return [run[-1][name] for run in self.runs if len(run) == self.config.iterations and name in run[-1]]

    def lines(self) -> list[dict[str, Any]]:
        """One record a run, plain JSON values; no loss where it diverged."""
        what = {"problem": self.problem, "method": self.method.name, "lr": self.config.lr}
        return [
            {
                **what,
                "seed": seed,
                "loss": loss if isfinite(loss) else None,
                "iterations": len(run),
                "seconds": run[-1]["seconds"] if run else 0.0,
                **{key: value for key, value in (run[-1] if run else {}).items() if key.startswith("test_")},
            }
            for seed, (loss, run) in enumerate(zip(self.losses, self.runs, strict=True))
        ]


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; zero for one, infinite if a value is.

    Args:
        values: one a seed.
    """
    if not all(map(isfinite, values)):
        return inf
    return stdev(values) if len(values) > 1 else 0.0


def run_study(study: Study, folder: RunFolder, *, jobs: int = 1) -> list[Outcome]:
    """Run what is left to do.

    Args:
        study: what to compare.
        folder: takes the run folders.
        jobs: processes.

    Returns:
        What each method reached with each learning rate.

    Raises:
        DataError: a run's folder holds another run.
        ProblemError: another process writes into one.
    """
    groups = [(problem, seed) for problem in study.problems for seed in range(study.seeds)]
    if jobs == 1 or len(groups) == 1:
        for problem, seed in groups:
            _run_group(study, folder.path, problem, seed)
    else:
        from joblib import Parallel, delayed

        threads, parent = torch.get_num_threads(), os.getpid()
        work = (delayed(_in_worker)(study, folder.path, *group, threads, parent) for group in groups)
        Parallel(n_jobs=min(jobs, len(groups)))(work)
    found = outcomes(study, folder)
    folder.keep_metrics(-1)
    for line in (line for outcome in found for line in outcome.lines()):
        folder.log(line)
    return found


def outcomes(study: Study, folder: RunFolder) -> list[Outcome]:
    """Read what the runs of a study have measured.

    Args:
        study: that was run.
        folder: of it.
    """
    found = []
    for problem in study.problems:
        samples = len(learning_task(problem).build().train_targets)
        by_seed = [study.configs(problem, samples, seed) for seed in range(study.seeds)]
        for column in zip(*by_seed, strict=True):
            method, config = column[0]
            runs = [run_folder(folder, *pair).metrics() for pair in column]
            window = max(1, min(samples // config.batch_size, config.iterations))
            found.append(Outcome(problem, method, config, window, runs))
    return found


def best(found: Iterable[Outcome], problem: str) -> list[Outcome]:
    """The outcome of each method's best learning rate on one task, by the mean final loss.

    Args:
        found: of a study.
        problem: name of the task.
    """
    leaders: dict[str, Outcome] = {}
    for outcome in (each for each in found if each.problem == problem):
        name = outcome.method.name
        if name not in leaders or outcome.loss < leaders[name].loss:
            leaders[name] = outcome
    return list(leaders.values())


class Progress:
    """How far a study has come, read from the metrics of its runs, whichever process writes them.

    Args:
        study: that is run.
        folder: of it.
    """

    def __init__(self, study: Study, folder: RunFolder) -> None:
        self.done: Counter[tuple[str, int]] = Counter()
        self.totals: Counter[tuple[str, int]] = Counter()
        self._files: list[tuple[tuple[str, int], Path]] = []
        self._read: Counter[Path] = Counter()
        for problem in study.problems:
            samples = len(learning_task(problem).build().train_targets)
            for seed in range(study.seeds):
                for method, config in study.configs(problem, samples, seed):
                    self.totals[problem, seed] += config.iterations
                    self._files.append(((problem, seed), _path(folder.path, method, config) / METRICS))

    def update(self) -> None:
        """Read what was written since the last call."""
        for group, path in self._files:
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self._read[path])
                    new = file.read()
                self._read[path] += len(new)
                self.done[group] += new.count(b"\n")


def _rate(record: LearningRecord, method: Method) -> float:
    if method.lr is not None:
        return method.lr
    return record.learning_rates.get(method.optimizer, optimizer(method.optimizer).lr)


def run_folder(folder: RunFolder, method: Method, config: TrainConfig) -> RunFolder:
    """The folder of one run of a study.

    Args:
        folder: of the study.
        method: of the run.
        config: of the run.
    """
    return RunFolder.open(_path(folder.path, method, config))


def _path(folder: Path, method: Method, config: TrainConfig) -> Path:
    return folder / f"{config.problem}-{method.name}-lr{config.lr:g}-seed{config.seed}"


def _run_group(
    study: Study, folder: Path, problem: str, seed: int, on_step: Callable[..., None] = lambda run, record: None
) -> None:
    """Train every method of one task and seed in turn, from where each stands."""
    task = learning_task(problem).build()
    with ExitStack() as locks:
        runs = []
        for method, config in study.configs(problem, len(task.train_targets), seed):
            inner = _open(_path(folder, method, config), config)
            locks.enter_context(inner.locked())
            runs.append((open_trainer(inner, task)[0], inner))
        train(runs, on_step, may_diverge=True)


def _open(path: Path, config: TrainConfig) -> RunFolder:
    """The folder of one run, made or found again."""
    asked = asdict(config)
    if not (path / CONFIG).exists():
        return RunFolder.create(path, {"command": "train", "train": asked})
    found = RunFolder.open(path)
    if found.config.get("train") != asked:
        raise DataError(
            f"{path} holds a run of {found.config.get('train')}; expected {asked}: start the study in a new folder"
        )
    return found


def _in_worker(study: Study, folder: Path, problem: str, seed: int, threads: int, parent: int) -> None:
    """A group in a process of its own, which ends when the process that began the study is gone."""
    torch.set_num_threads(threads)

    def follow(run: int, record: Mapping[str, Any]) -> None:
        if parent not in (os.getppid(), os.getpid()):
            os._exit(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the process that began the study builds each method too, and warns
        _run_group(study, folder, problem, seed, follow)
