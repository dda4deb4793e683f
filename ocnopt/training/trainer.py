"""A training run as a user would write it: one model, one optimiser, one loop, a checkpoint now and then.

The order of the samples follows from the seed and the epoch, and a run keeps a random state of its own. So a run that
was killed and resumed gives the numbers of an unbroken one, and several runs stepped in turn give those of each alone.

Within a process group of torch.distributed each rank takes its part of every batch, gradients are averaged, and rank 0
measures; models that draw random numbers draw others on each rank.

Shapes: a batch is ``(B, ...)`` inputs and ``(B, ...)`` targets; samples at the end of an epoch that fill no batch are
left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from ocnopt.checks import nearest
from ocnopt.errors import DataError, NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.statistics import Statistics
from ocnopt.ocp import FreeHorizon
from ocnopt.optim.checks import is_distributed
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.ranks import Ranks, beside
from ocnopt.optim.registry import optimizer
from ocnopt.problems import Task, learning_task
from ocnopt.runs import RunFolder

RULES = ("fixed", "feedback", "adjoint")
HORIZON = FreeHorizon(initial=1.0, lower=0.2, upper=2.0)
_FORMAT = 3
_EVALUATE_EVERY = 10  # iterations, at least


@dataclass(frozen=True)
class TrainConfig:
    """What a training run was asked.

    Args:
        problem: name of a learning problem.
        optimizer: name of an optimiser.
        lr: learning rate.
        horizon: "fixed" leaves T = 1; "feedback" moves it by the second-order policy, "adjoint" by the first-order one,
            both that of each Neural ODE in the model.
        horizon_lr: step of the policy.
        horizon_penalty: c of the cost (c/2) T^2 on the integration time.
        horizon_every: iterations from one update of T to the next.
        iterations: steps in all.
        batch_size: samples a step.
        checkpoint_every: iterations between checkpoints.
        seed: of the weights, the order of the samples and whatever the model draws.
        model: options of the problem's model.
        options: of the optimiser, beside those that its name stands for.

    Raises:
        ProblemError: an unknown name or a number out of range.
    """

    problem: str
    optimizer: str
    lr: float
    horizon: str = "fixed"
    horizon_lr: float = 1.0
    horizon_penalty: float = 10.0
    horizon_every: int = 10
    iterations: int = 143
    batch_size: int = 128
    checkpoint_every: int = 20
    seed: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        optimizer(self.optimizer)
        if self.horizon not in RULES:
            near = nearest(self.horizon, RULES)
            raise ProblemError(f"horizon is {self.horizon!r}; expected one of {', '.join(RULES)}{near}")
        for name in ("iterations", "batch_size", "checkpoint_every", "horizon_every"):
            if getattr(self, name) < 1:
                raise ProblemError(f"{name} is {getattr(self, name)}; expected a whole number of at least 1")
        for name in ("lr", "horizon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ProblemError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.horizon_penalty < math.inf:
            raise ProblemError(f"horizon_penalty is {self.horizon_penalty}; expected zero or a positive number")
        learning_task(self.problem)


class Trainer:
    """Model, optimiser and policy of one run, advanced one iteration at a time.

    Args:
        task: data, model and loss.
        config: what to do with them.
        clock: that seconds are read from.

    Raises:
        ProblemError: a batch larger than the training part, or a rule for T where the model has no Neural ODE.
    """

    def __init__(self, task: Task, config: TrainConfig, clock: Callable[[], float] = perf_counter) -> None:
        samples = len(task.train_targets)
        if config.batch_size > samples:
            raise ProblemError(f"batch_size is {config.batch_size}; expected at most the {samples} training samples")
        self.task = task
        self.config = config
        self._clock = clock
        self.batches_per_epoch = task.batches(config.batch_size)
        self.iteration = 0
        self.seconds = 0.0
        self.diverged = ""
        moves = {} if config.horizon == "fixed" else {"horizon": HORIZON}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _make_model(task, {**config.model, **moves})
            self._random_state = torch.get_rng_state()
        self._solves = _Solves(self.model)
        self.optimizer = _make_optimizer(self.model, config)
        self.policies = _policies(self.model, task, config)

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or none can follow."""
        return self.iteration >= self.config.iterations or bool(self.diverged)

    def step(self) -> dict[str, Any]:
        """Train on one batch.

        Returns:
            The line of metrics: iteration, epoch, loss, seconds of training so far, for Neural ODEs T and the forward
            and backward evaluations, and at the end of an epoch the metrics of the task, at most every tenth iteration.

        Raises:
            NonFiniteError: the loss is NaN or infinite; the weights are those before this step.
        """
        ranks = beside(None) if is_distributed() else None
        with self._own_random_state(ranks):
            self._solves.clear()
            began = self._clock()
            inputs, targets = self.task.batch(self.iteration, size=self.config.batch_size, seed=self.config.seed)
            if ranks is not None:
                inputs, targets = (ranks.part(tensor) for tensor in (inputs, targets))

            def closure() -> Any:
                loss = self.task.loss(self.model(inputs), targets)
                if ranks is not None:
                    return self._mean_loss(ranks, loss * (len(targets) * ranks.count / self.config.batch_size))
                if not optimizer(self.config.optimizer).wants_loss:
                    self._check(loss)
                    self.optimizer.zero_grad()
                    loss.backward()
                return loss

            loss: Any = self.optimizer.step(closure)
            for policy in self.policies:
                policy.step()
            self.seconds += self._clock() - began
            self.iteration += 1
            record = {
                "iteration": self.iteration,
                "epoch": (self.iteration - 1) // self.batches_per_epoch,
                "loss": loss.item(),
                **self._solves.metrics(),
                "seconds": self.seconds,
            }
            whole_epochs = self.batches_per_epoch * math.ceil(_EVALUATE_EVERY / self.batches_per_epoch)
            if (self.iteration % whole_epochs == 0 or self.finished) and (ranks is None or ranks.rank == 0):
                record |= self.task.evaluate(self.model)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "format": _FORMAT,
            "config": asdict(self.config),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "diverged": self.diverged,
            "random_state": self._random_state,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policies": [policy.state_dict() for policy in self.policies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state written by a run with the same configuration.

        Args:
            state: of :meth:`state_dict`.

        Raises:
            DataError: another format or another configuration.
        """
        if state.get("format") != _FORMAT or state.get("config") != asdict(self.config):
            raise DataError(
                f"the checkpoint has format {state.get('format')} and configuration {state.get('config')}; expected "
                f"format {_FORMAT} and {asdict(self.config)}: resume with the configuration that the run began with"
            )
        self.iteration, self.seconds, self.diverged = state["iteration"], state["seconds"], state["diverged"]
        self._random_state = state["random_state"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for policy, saved in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(saved)

    def _mean_loss(self, ranks: Ranks, loss: Tensor) -> Tensor:
        """The loss of the whole batch, its gradients in ``.grad``."""
        mean = ranks.sum(loss.detach()) / ranks.count
        self._check(mean)
        self.optimizer.zero_grad()
        loss.backward()
        ranks.average([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])
        return mean

    def _check(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is {loss.item()} at iteration {self.iteration + 1}; expected a finite number: lower the "
                f"learning rate (it is {self.config.lr}); the last checkpoint is kept"
            )

    @contextmanager
    def _own_random_state(self, ranks: Ranks | None) -> Iterator[None]:
        """Draw from this run's random state, and leave the global one alone."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            if ranks is not None and ranks.rank > 0:  # anew in every iteration, as only rank 0 is saved
                torch.manual_seed((1_000_003 * self.config.seed + self.iteration) * 1009 + ranks.rank)
            yield
            self._random_state = torch.get_rng_state()


def _neural_odes(model: nn.Module) -> list[NeuralODE]:
    return [module for module in model.modules() if isinstance(module, NeuralODE)]


class _Solves:
    """The solves of a step, by every Neural ODE of a model, each as often as it is called."""

    def __init__(self, model: nn.Module) -> None:
        self.odes = _neural_odes(model)
        self._seen: list[Statistics] = []
        for ode in self.odes:
            ode.register_forward_hook(self._note)

    def _note(self, ode: nn.Module, arguments: object, output: object) -> None:
        self._seen.append(cast(NeuralODE, ode).statistics)

    def clear(self) -> None:
        """Forget the last step."""
        self._seen.clear()

    def metrics(self) -> dict[str, int | float]:
        """T, and the field evaluations of the step; nothing where there is no Neural ODE."""
        if not self.odes:
            return {}
        horizon = self.odes[0].horizon
        end = self.odes[0].T if isinstance(horizon, FreeHorizon) else abs(horizon.t1 - horizon.t0)
        forward, backward = (sum(getattr(s, way) for s in self._seen) for way in ("forward", "backward"))
        return {"T": float(end), "forward": forward, "backward": backward}


def _make_model(task: Task, options: dict[str, Any]) -> nn.Module:
    if not options:
        return task.make_model()
    try:
        return task.make_model(**options)
    except TypeError as error:
        if "horizon" in options:
            _free_odes(task.make_model(), task)
        raise ProblemError(
            f"the model of {task.name} does not take the options {', '.join(options)} ({error}); expected options of "
            "its constructor: leave out what it does not know"
        ) from error


def _make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    record = optimizer(config.optimizer)
    try:
        return replace(record, options={**record.options, **config.options}).build(model, config.lr)
    except TypeError as error:
        if not config.options:
            raise
        raise ProblemError(
            f"the options {', '.join(config.options)} came for {record.label} ({error}); expected options of "
            f"{record.class_name} that its name and lr do not settle: leave out what it does not take"
        ) from error


def _free_odes(model: nn.Module, task: Task) -> list[NeuralODE]:
    """The Neural ODEs whose T a rule moves."""
    odes = _neural_odes(model)
    if not odes:
        raise ProblemError(
            f"a rule for the integration time T came for the model of {task.name}, which has 0 Neural ODEs; expected "
            "one at least: use horizon='fixed', or a problem such as digits"
        )
    return odes


def _policies(model: nn.Module, task: Task, config: TrainConfig) -> list[HorizonPolicy]:
    """Those that move the end time of each Neural ODE; none where it is fixed."""
    if config.horizon == "fixed":
        return []
    options: dict[str, Any] = {"rule": config.horizon, "lr": config.horizon_lr, "penalty": config.horizon_penalty}
    return [HorizonPolicy(ode, every=config.horizon_every, **options) for ode in _free_odes(model, task)]


def open_trainer(folder: RunFolder, task: Task | None = None) -> tuple[Trainer, list[dict[str, Any]]]:
    """The trainer of a run folder, at its last checkpoint, and the metrics, cut back to there.

    Args:
        folder: whose configuration holds a "train" part.
        task: of the run, where it is loaded already.

    Raises:
        DataError: the folder is of another command or version.
    """
    trainer = read_trainer(folder, task)
    return trainer, folder.keep_metrics(trainer.iteration)


def read_trainer(folder: RunFolder, task: Task | None = None) -> Trainer:
    """The same, and the folder stays as it is.

    Args:
        folder: see :func:`open_trainer`.
        task: likewise.
    """
    if "train" not in folder.config:
        raise DataError(
            f"{folder.path} was made by {folder.config.get('command')!r}; expected a folder of 'ocnopt train'"
        )
    config = folder.entry("train", lambda options: TrainConfig(**options))
    trainer = Trainer(task or learning_task(config.problem).build(), config)
    state = folder.load_checkpoint()
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


def train(
    runs: Sequence[tuple[Trainer, RunFolder]],
    on_step: Callable[[int, dict[str, Any]], None] = lambda run, record: None,
    *,
    may_diverge: bool = False,
) -> None:
    """Train to the end, one iteration of each run in turn: a busy machine slows all alike, and times can be compared.

    Args:
        runs: each where it stands, with the folder that takes its metrics and checkpoints.
        on_step: called with the position of a run and its line of metrics.
        may_diverge: whether a loss that is no longer finite ends its own run only.

    Raises:
        NonFiniteError: a loss is no longer finite.
    """
    while not all(trainer.finished for trainer, _ in runs):
        for i, (trainer, folder) in enumerate(runs):
            if trainer.finished:
                continue
            try:
                on_step(i, advance(trainer, folder))
            except (NonFiniteError, torch.linalg.LinAlgError) as error:
                if not may_diverge:
                    raise
                trainer.diverged = str(error)
                folder.save_checkpoint(trainer.state_dict())


def advance(trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """One iteration, its line of metrics, and a checkpoint where one is due.

    Args:
        trainer: where the run stands.
        folder: takes metrics and checkpoints.
    """
    record = trainer.step()
    folder.log(record)
    if trainer.iteration % trainer.config.checkpoint_every == 0 or trainer.finished:
        folder.save_checkpoint(trainer.state_dict())
    return record
