"""What a solve cost."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Statistics:
    """What one solve cost: evaluations of the field forward and in its backward pass, steps taken and steps rejected.

    Steps are counted for methods of ours alone; with ``error_norm="sample"`` for each sample ``(B,)``, while an
    evaluation is of all samples.
    """

    forward: int = 0
    backward: int = 0
    steps: int | Tensor = 0
    rejected: int | Tensor = 0


@dataclass
class Dearest:
    """The most evaluations by one solve forwards since it was last read; until there is another, the same again."""

    most: int = 0
    latest: Statistics = field(default_factory=Statistics)
    is_read: bool = False

    def begin(self, statistics: Statistics) -> None:
        """A solve begins, which counts there."""
        self.most = 0 if self.is_read else self.read()
        self.latest, self.is_read = statistics, False

    def read(self) -> int:
        """The most evaluations."""
        self.is_read = True
        return max(self.most, self.latest.forward)
