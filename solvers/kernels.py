"""What DDP asks of a kernel: the parts of an iteration that cost time."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ocnopt.differential.sweep import Direction
from ocnopt.paths import Path

# A number of each problem: numpy's, without a batch a scalar, with one an array of its shape.
Numbers = Any


class Merit(NamedTuple):
    """What a step of size alpha must gain: alpha * least, or alpha * slope but for slack.

    The gain is what the cost loses, and alpha * penalty for the gaps that close; no step is taken where slope < 0.
    """

    penalty: Numbers
    slope: Numbers
    least: Numbers
    slack: Numbers


@runtime_checkable
class Kernel(Protocol):
    """What an iteration spends its time on.

    Attributes:
        apart: whether rows of a batch may be left out.
    """

    apart: bool

    @property
    def name(self) -> str:
        """What the status calls it."""
        ...

    @property
    def window(self) -> int:
        """How many problems of a batch are best worked on at a time."""
        ...

    def refresh(self, problem: Any) -> None:
        """Take up what may have changed of the problem: its data and ``step_data``."""
        ...

    def evaluate(self, states: Tensor, controls: Tensor, rows: Tensor | None = None) -> Path:
        """A given path of all problems, or of those rows of the batch, with its cost and its gaps."""
        ...

    def direction(self, path: Path, mu: Numbers, *, exact: bool) -> Direction:
        """Sweep backwards, with the curvature of the dynamics where ``exact``."""
        ...

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """The path of the feedback law for each step size ``(A,)``, on an axis in front of the lead."""
        ...

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Numbers, alphas: Sequence[float]
    ) -> tuple[Path, Numbers] | None:
        """The longest step that gains enough, the path with its old gaps; None where roll_out must be asked instead."""
        ...

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """The groups in which some step sizes are best tried for that many problems."""
        ...
