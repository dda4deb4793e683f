"""What a solve cost."""

from dataclasses import dataclass

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
