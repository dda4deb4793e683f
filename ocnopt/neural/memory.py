"""What a field does with memory that is not its own to write to."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ocnopt.errors import ProblemError


class Memory(NamedTuple):
    """Where a slope lay, and how often that had been written to."""

    place: StorageWeakRef | None
    version: int


NO_MEMORY = Memory(None, 0)


def check_memory(slope: Tensor, last: Memory, *, is_edited: bool) -> Memory:
    """Refuse a slope in the memory of the one before, which has been overwritten by it, and a state that was edited.

    A constant slope may be the same tensor each time.
    """
    if is_edited:
        raise ProblemError(
            "the field changes its state x in place; expected it to leave x as it is: write y = f(x) for x.f_() and "
            "x = x + y for x += y"
        )
    if slope.is_inference() or not slope._version or torch._C._functorch.is_functorch_wrapped_tensor(slope):
        return NO_MEMORY  # it is new, or cannot be told
    now = Memory(StorageWeakRef(slope.untyped_storage()), slope._version)
    if last.place is not None and now.place == last.place and now.version != last.version:
        raise ProblemError(
            "the field has written its slope over the one that it returned before, which is still in use; expected a "
            "new tensor each time: leave out out=, or return a clone()"
        )
    return now
