"""What a field does with memory that is not its own to write to."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ocnopt.errors import ProblemError

LAST = 16  # slopes that are looked at: more than a step has


class Slopes:
    """Where the last slopes lay that had been written to, and how often."""

    def __init__(self) -> None:
        self._versions: dict[StorageWeakRef, int] = {}

    def check(self, slope: Tensor, *, is_edited: bool) -> None:
        """Refuse a slope in the memory of one before, which it has overwritten, and a state that was ``is_edited``.

        A constant slope may be the same tensor each time.
        """
        if is_edited:
            raise ProblemError(
                "the field changes its state x in place; expected it to leave x as it is: write y = f(x) for x.f_(), "
                "and x = x + y for x += y"
            )
        if slope.is_inference() or not slope._version or torch._C._functorch.is_functorch_wrapped_tensor(slope):
            return  # it is new, or cannot be told
        place = StorageWeakRef(slope.untyped_storage())  # while it is held, no other storage has its address
        if self._versions.setdefault(place, slope._version) != slope._version:
            raise ProblemError(
                "the field has written its slope over one that it returned before, which is still in use; expected a "
                "new tensor each time: leave out out=, or return a clone()"
            )
        if len(self._versions) > LAST:
            del self._versions[next(iter(self._versions))]
