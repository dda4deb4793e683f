"""Peak memory of a piece of torch code on the CPU: the bytes of all tensors that were alive at once."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocnopt.problems import Task
from ocnopt.training.trainer import TrainConfig, Trainer


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations return, for as long as they live; what is inside one operation is not seen.

    Example:
        >>> with PeakMemory() as memory:
        ...     first = torch.zeros(100, dtype=torch.float64)
        ...     second = (first + 1).reshape(10, 10)
        ...     del first
        ...     third = second.square()
        >>> memory.peak
        1600
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the new storages."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            weakref.finalize(storage, self._forget, key)
            self._live += self._seen[key]
            self.peak = max(self.peak, self._live)

    def _forget(self, key: int) -> None:
        self._live -= self._seen.pop(key)


def peak_bytes(task: Task, config: TrainConfig, steps: int = 2) -> int:
    """The peak of the first iterations of a run: weights, gradients, optimiser and whatever lives between the passes.

    Args:
        task: of the run.
        config: of the run.
        steps: iterations.
    """
    with PeakMemory() as memory:
        trainer = Trainer(task, replace(config, lr=1e-12))  # a rate at which the run diverges takes as much
        for _ in range(steps):
            trainer.step()
    return memory.peak
