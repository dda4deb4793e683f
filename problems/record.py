"""What the library knows about one problem: how to build it, where to start, what the answer is and who says so.

Notation: N steps, n states, m controls, T the end time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocnopt.ocp import OCP
from ocnopt.problems.drawing import Drawing
from ocnopt.staged import StagedOCP


@dataclass(frozen=True, eq=False)
class ControlRecord:
    """A control problem with its known answer.

    Args:
        name: the name in the registry.
        summary: one line for a table.
        build: makes the problem; its keyword arguments vary the problem.
        source: where the optimal cost comes from.
        optimal_cost: of the continuous problem (of the discrete one where the problem is discrete), best known minimum.
        tolerance: how far the optimal cost can be trusted.
        start: the default start in words.
        steps: recommended number of steps.
        integrator: recommended integrator.
        T_star: the optimal end time where it is free.
        discrete_values: steps -> optimal cost under RK4 with constant controls on equal steps, the running cost
            integrated by the same stages.
        other_minima: costs of known local minima, smallest first.
        state_labels: name and unit of each state.
        control_labels: name and unit of each control.
        drawing: how the system looks at an instant, where there is something to see.
    """

    name: str
    summary: str
    build: Callable[..., OCP | StagedOCP]
    source: str
    optimal_cost: float
    tolerance: float
    start: str
    steps: int = 100
    integrator: str = "rk4"
    T_star: float | None = None
    discrete_values: Mapping[int, float] = field(default_factory=dict)
    other_minima: tuple[float, ...] = ()
    state_labels: tuple[str, ...] = ()
    control_labels: tuple[str, ...] = ()
    drawing: Drawing | None = None
    kind: Literal["control"] = "control"

    @property
    def initial_guess(self) -> Any:
        """The start that the problem carries: a mapping, a function of N that makes one, or None for zero controls."""
        return self.build().initial_guess


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample is classified right: 1 or 0.

    Args:
        outputs: ``(B, C)``, the largest entry names the class; or ``(B,)``, the probability of class 1.
        targets: ``(B,)`` classes.

    Example:
        >>> accuracy(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1])).tolist()
        [1.0, 0.0]
        >>> accuracy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 1.0])).tolist()
        [1.0, 0.0]
    """
    classes = outputs.argmax(dim=1) if outputs.ndim == 2 else outputs > 0.5
    return (classes == targets).double()


@dataclass(frozen=True)
class Picture:
    """What can be drawn of a trained model.

    Args:
        name: of the file.
        caption: what to see in it.
        draw: ``draw(model, task)`` makes a matplotlib figure, or returns None where there is nothing to see; the model
            is in evaluation mode.
        as_it_trains: whether it is worth seeing on the way too.
    """

    name: str
    caption: str
    draw: Callable[[nn.Module, "Task"], Any]
    as_it_trains: bool = False


@dataclass(frozen=True, eq=False)
class Task:
    """Data, model, loss and measures: all that a training loop needs to know of a learning problem.

    Args:
        name: the name in the registry.
        train_inputs: ``(N, ...)``, with ``train_targets`` ``(N, ...)``.
        test_inputs: likewise, never used in training.
        make_model: ``make_model(**options) -> Module``, freshly initialised from torch's global random state. A model
            around a Neural ODE takes its horizon as the first option.
        loss: ``loss(outputs, targets) -> ()``, a mean over samples; outputs are whatever the model returns. A density
            returns log-probabilities, and its targets are its inputs.
        split: how training and test part were chosen, in words.
        metrics: name -> ``metric(outputs, targets) -> (B,)``; a name that ends with "accuracy" is a share of one.
        pictures: of a trained model.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    make_model: Callable[..., nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    split: str
    metrics: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=lambda: {"accuracy": accuracy})
    pictures: tuple[Picture, ...] = ()

    def batches(self, size: int) -> int:
        """The number of whole batches in an epoch.

        Args:
            size: of a batch.
        """
        return len(self.train_targets) // size

    def batch(self, iteration: int, *, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The samples of an iteration, from a new random order in each epoch.

        Args:
            iteration: counted from zero over all epochs.
            size: of the batch; samples at the end of an epoch that fill none are left out.
            seed: of the orders.
        """
        epoch, position = divmod(iteration, self.batches(size))
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        chosen = torch.randperm(len(self.train_targets), generator=generator)[position * size :][:size]
        return self.train_inputs[chosen], self.train_targets[chosen]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Every metric on the test part, as ``test_<name>``; the model is left in training mode.

        Args:
            model: of this task.
        """
        model.eval()
        parts = zip(self.test_inputs.split(512), self.test_targets.split(512), strict=True)
        answers = [(model(inputs), targets) for inputs, targets in parts]
        model.train()
        return {
            f"test_{name}": float(torch.cat([metric(*answer) for answer in answers]).double().mean())
            for name, metric in self.metrics.items()
        }


LearningProblem = Task  # the name in version 0.1


@dataclass(frozen=True, eq=False)
class LearningRecord:
    """A learning problem by name.

    Args:
        name: the name in the registry.
        summary: one line for a table.
        build: loads the data and returns a :class:`Task`; its keyword arguments vary it.
        source: origin and licence of the data, origin of the model.
        batch_size: recommended.
        epochs: recommended.
        learning_rates: optimiser name -> tuned learning rate.
    """

    name: str
    summary: str
    build: Callable[..., Task]
    source: str
    batch_size: int
    epochs: int
    learning_rates: Mapping[str, float]
    kind: Literal["learning"] = "learning"


Record = ControlRecord | LearningRecord
