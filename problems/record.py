"""What the library knows about one problem: how to build it, where to start, what the answer is and who says so.

Notation: N steps, n states, m controls, T the end time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ocnopt.ocp import OCP
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
    kind: Literal["control"] = "control"

    @property
    def initial_guess(self) -> Any:
        """The start that the problem carries: a mapping, a function of N that makes one, or None for zero controls."""
        return self.build().initial_guess


@dataclass(frozen=True, eq=False)
class LearningProblem:
    """Data, model and loss, ready for an ordinary training loop.

    Args:
        name: the name in the registry.
        train_inputs: ``(N, ...)``, with ``train_targets`` ``(N,)``.
        test_inputs: likewise, never used in training.
        make_model: ``make_model(horizon) -> Module``, freshly initialised from torch's global random state.
        loss: ``loss(outputs, targets) -> ()``, a mean over samples.
        split: how training and test part were chosen, in words.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    make_model: Callable[..., nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    split: str


@dataclass(frozen=True, eq=False)
class LearningRecord:
    """A learning problem by name.

    Args:
        name: the name in the registry.
        summary: one line for a table.
        build: loads the data and returns a :class:`LearningProblem`; its keyword arguments vary it.
        source: origin and licence of the data, origin of the model.
        batch_size: recommended.
        epochs: recommended.
        learning_rates: optimiser name -> tuned learning rate.
    """

    name: str
    summary: str
    build: Callable[..., LearningProblem]
    source: str
    batch_size: int
    epochs: int
    learning_rates: Mapping[str, float]
    kind: Literal["learning"] = "learning"


Record = ControlRecord | LearningRecord
