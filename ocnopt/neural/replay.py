"""The calls of a tape once more, after some parameters have moved: how far the states have moved by then."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ocnopt.neural.tape import Call, Slot, Tape, precise
from ocnopt.neural.trees import like, tensors


class Replay:
    """The calls of a tape once more, with parameters as they are by now.

    Args:
        tape: the recording.
        order: the calls in the order to take them.
        places: the place of each call in that order.
    """

    def __init__(self, tape: Tape, order: Sequence[int], places: Sequence[int]) -> None:
        self._tape, self._order, self._places, self._next = tape, order, places, 0
        self._new: dict[int, Tensor] = {}
        self._casts = any(enabled for enabled, _, _ in tape.surroundings.autocast.values())

    def advance(self, call: int) -> None:
        """Take the calls before ``call``."""
        with self._tape.surroundings.autocasting() if self._casts else nullcontext():
            while self._next < self._places[call]:
                self._take(self._tape.calls[self._order[self._next]])
                self._next += 1

    def value(self, slot: int) -> Tensor:
        """A slot of the cut as it is by now."""
        return self._new[slot]

    def moved(self, cut: Sequence[int]) -> Tensor:
        """The change of the loss, for each sample ``(rows)``, that the change of the cut brings to first order."""
        total: Tensor | None = None
        for slot in cut:
            felt = self._tape.felt(slot, self._is_executed)
            if felt is not None:
                pair = precise(self._new[slot]) - self._tape.value(slot), precise(felt)
                change = torch.linalg.vecdot(*(t if t.ndim == 2 else t.reshape(len(t), -1) for t in pair))
                total = change if total is None else total + change
        if total is None:
            return next(iter(self._tape.gradients.values())).new_zeros(self._tape.rows)
        return total

    def _is_executed(self, call: int) -> bool:
        return self._places[call] < self._next

    def _take(self, call: Call) -> None:
        if call.noise is not None:
            self._tape.surroundings.set_noise(call.noise)
        args = [_filled(value, self._new, call.is_inplace) for value in call.args]
        kwargs = {name: _filled(value, self._new, call.is_inplace) for name, value in call.kwargs.items()}
        out = call.function(*args, **kwargs)
        for slot, tensor in zip(call.outputs, tensors(out), strict=True):
            if slot is not None:
                self._new[slot] = tensor
        for slot in call.inputs:
            if max(map(self._places.__getitem__, self._tape.uses[slot])) <= self._next:
                self._new.pop(slot, None)


def _filled(value: Any, new: dict[int, Tensor], copies: bool) -> Any:
    if isinstance(value, Slot):
        value = new[value.index]
    if isinstance(value, Tensor):
        return value.clone() if copies else value
    if isinstance(value, (list, tuple)):
        return like(value, [_filled(item, new, copies) for item in value])
    return value
