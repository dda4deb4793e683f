"""The stacks of a model's matrices, kept from one iteration to the next."""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ocnopt.differential.kronecker import working_dtype
from ocnopt.optim.arrangement import arranged, can_be_joined
from ocnopt.optim.bases import is_wide
from ocnopt.optim.blocks import Block
from ocnopt.optim.gradient_checks import sizes
from ocnopt.optim.narrow import Narrow
from ocnopt.optim.stack import Groups, Single, Stack, States, kind_of
from ocnopt.optim.states import take_in
from ocnopt.optim.thin import Thin


class Stacks:
    """All matrices of a model, in stacks.

    Args:
        blocks: the matrices.
        alone: weights of those whose eigenbases are of a kind of their own.
    """

    def __init__(self, blocks: Iterable[Block], alone: Collection[Tensor]) -> None:
        self._blocks, self._alone = [*blocks], alone
        self._stacks: list[Stack] = []
        self._found: list[Stack] = []
        self._outside: list[Tensor] = []
        self._loose: dict[Tensor, Tensor] = {}
        self._made_for: list[Any] = []
        self._sought: Set[Tensor] = frozenset()  # parameters for which these were found

    def gather(self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]) -> float:
        """Take the gradients of an iteration to hand; the norm of all together. No value of a state changes."""
        kinds = [kind_of(p) for block in self._blocks for p in block.parameters]
        if kinds != self._made_for:
            self._made_for, self._stacks, self._sought = kinds, [*self._made()], frozenset()
        if gradients.keys() != self._sought:
            self._find(gradients)
        self._loose = {parameter: gradients[parameter] for parameter in self._outside}
        numbers = [*itertools.chain.from_iterable(stack.gather(gradients, states, names) for stack in self._found)]
        numbers += [sizes([*self._loose.values()])] if self._loose else []
        read = iter(_read(numbers))
        for stack in self._found:
            stack.read([*itertools.islice(read, 3)])
        loose = next(read, [])
        return math.hypot(*loose, *(size for stack in self._found for _, size, _ in stack.angles))

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> list[Stack]:
        """Take the gradients that were gathered into all momenta; the stacks that have all of some matrix."""
        for stack in self._found:
            stack.take_in(gradients, states, names, of)
        take_in(self._loose, states, names, of)
        return self._found

    def _find(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Find the stacks of what has a gradient, and what is in none."""
        self._sought = frozenset(gradients)
        self._found = [stack for stack in self._stacks if stack.find(gradients)]
        here = (block for stack in self._found for block in itertools.compress(stack.blocks, stack.is_present))
        inside = {parameter for block in here for parameter in block.parameters}
        self._outside = [parameter for parameter in gradients if parameter not in inside]

    def release(self) -> None:
        """Let go of the gradients."""
        self._loose = {}
        for stack in self._found:
            stack.release()

    def _made(self) -> Iterator[Stack]:
        kinds: dict[Any, list[Block]] = {}
        for block in self._blocks:
            kind = working_dtype(block.weight), block.weight.device
            if block.weight in self._alone or not can_be_joined(block):
                yield Single(block, torch.empty(0, dtype=kind[0], device=kind[1]))
            else:
                kinds.setdefault(kind, []).append(block)
        for (dtype, device), blocks in kinds.items():
            for bin_ in arranged(blocks):
                make = Thin if is_wide(bin_.rows, bin_.columns) else Narrow
                yield make(bin_, torch.empty(0, dtype=dtype, device=device))


def _read(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Tensors of one axis as lists, read together."""
    if len({*map(attrgetter("dtype", "device"), tensors)}) > 1:
        widest = functools.reduce(torch.promote_types, map(attrgetter("dtype"), tensors))
        tensors = [tensor.to(tensors[0].device, widest) for tensor in tensors]
    rest = iter(torch.cat([*tensors]).tolist())
    return [[*itertools.islice(rest, len(tensor))] for tensor in tensors]
