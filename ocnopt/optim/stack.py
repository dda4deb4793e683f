"""Matrices that one iteration works on together, so that it makes as many calls for all of them as for one.

Shapes: a stack is ``(n, b, a)``, with n the groups of all its matrices, b and a the most of any of them.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.optim.bases import Basis, Turned, is_wide
from ocnopt.optim.blocks import Block
from ocnopt.optim.states import DECAY, State, basis_of, fits, go_along, is_changed_together, newest, observe, take_in

Groups = Mapping[Tensor, Mapping[str, Any]]
States = Mapping[Tensor, State]


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What must be the same for one tensor to take the place of another."""
    return tensor.dtype, tensor.device, tensor.shape


class Stack(ABC):
    """Matrices of one precision and device, with all that an iteration needs of them.

    Attributes:
        blocks: the matrices.
        slices: where each is.
        change: the last one of each ``(n, b, a)``.
        angles: of each matrix the product of gradient and last change, and the norms of both.
        moments: second moments, laid out as by ``basis``.
        basis: the eigenbases.
        is_present: which matrices have gradients in this iteration; what is here of others stays as it is.
        is_ready: which of them have an eigenbasis.
        is_changed: of which of them the last change is known, of all parameters in one step.
        counts: how many gradients the weight of each has had.
    """

    change: Tensor | None
    angles: Sequence[Sequence[float]]
    moments: Tensor
    basis: Basis
    counts: Sequence[int]
    _states: list[State]  # of the weights

    def __init__(self, blocks: Sequence[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.is_present, self.is_ready, self.is_changed = ([False] * len(blocks) for _ in range(3))
        counts = [block.groups for block in blocks]
        self.slices = [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]

    @property
    def shift(self) -> int:
        """By how many iterations refreshes come later: of sides that are both wide they take long, so by their size."""
        short = min(self.blocks[0].shape[1:])
        return short if is_wide(short) else 0

    def find(self, gradients: Mapping[Tensor, Tensor]) -> bool:
        """Whether there are gradients of all parameters of some of the matrices."""
        self.is_present = [all(p in gradients for p in block.parameters) for block in self.blocks]
        return any(self.is_present)

    @abstractmethod
    def gather(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]
    ) -> Sequence[Tensor]:
        """Take gradients to hand, and the last changes; the three rows that :meth:`read` wants, each ``(n,)``."""

    def read(self, numbers: Sequence[Sequence[float]]) -> None:
        """Take products of gradients and last changes, and the norms of both: of each slice, or of all in one."""
        products, *norms = numbers
        if len(products) == len(self.blocks):
            self.angles = [*zip(*numbers, strict=True)]
            return
        self.angles = [(sum(products[at]), *(math.hypot(*each[at]) for each in norms)) for at in self.slices]

    @abstractmethod
    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """Take the gradients that were gathered into the momenta, given the options of each parameter."""

    @abstractmethod
    def settle(self, states: States) -> None:
        """Take up the eigenbases that the states hold now."""

    @abstractmethod
    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Gradient and momentum of a block that is present, as matrices ``(groups, b, a)``."""

    def room(self) -> Tensor | None:
        """Memory for the next changes, if there is some: the last ones have been looked at."""
        return self.change

    def keep(self, changes: Tensor) -> None:
        """Take the changes of an iteration for those of the matrices that are present."""
        self.change = changes

    @abstractmethod
    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """The change of each parameter of a block."""

    @abstractmethod
    def turned(self) -> tuple[Turned, Turned]:
        """Gradient and momentum, turned."""

    def observe(self) -> None:
        """Take the gradients into the running means of G^T G and G G^T, but for sides that are wide."""
        for i, is_present in enumerate(self.is_present):
            if is_present:
                observe(self._states[i], self.pair(i)[0])

    def follow(self) -> bool:
        """Let all eigenbases follow their factors together, if that can be done."""
        return False

    def release(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the gradients, at the end of an iteration."""

    def learn(self, squares: Tensor) -> None:
        """Take the squares of turned gradients into the second moments."""
        # what the moments began with counts as one observation
        if self.is_alike():
            self.moments.lerp_(squares, newest(self.counts[0] + 1, DECAY))
            return
        weights = [newest(n + 1, DECAY) if here else 0.0 for n, here in zip(self.counts, self.is_present, strict=True)]
        self.moments.lerp_(squares, squares.new_tensor(self.of_slices(weights))[:, None, None])

    def is_alike(self) -> bool:
        """Whether all matrices are present, and have had as many gradients."""
        return all(self.is_present) and len({*self.counts}) == 1

    @abstractmethod
    def means(self) -> Tensor:
        """The mean second moment of each slice ``(n, 1, 1)``: the trace of its curvature over its size."""

    def of_slices(self, numbers: Sequence[float]) -> list[float]:
        """A number of each matrix, for each of its slices."""
        if self.slices[-1].stop == len(self.blocks):
            return [*numbers]
        return [number for number, block in zip(numbers, self.blocks, strict=True) for _ in range(block.groups)]


class Single(Stack):
    """One matrix, as its states hold it: with factors of samples, or in groups that are wide on their outputs alone."""

    def __init__(self, block: Block, like: Tensor) -> None:
        super().__init__([block], like)
        self._block, self._nothing = block, like
        self._gradient = self._momentum = like
        self._parts: dict[Tensor, Tensor] = {}
        self.change = None

    def gather(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]
    ) -> Sequence[Tensor]:
        """See :meth:`Stack.gather`."""
        block = self._block
        self._gradient = block.matrix(gradients)
        own = {p: states.get(p, {}) for p in block.parameters}
        self.is_changed = [is_changed_together([*own.values()])]
        if not self.is_changed[0]:
            self.change = None
        elif any(state["change"] is not self._parts.get(p) for p, state in own.items()):
            for p, state in own.items():
                go_along(state, names[p], gradients[p])
            self.change = block.matrix({p: state["change"] for p, state in own.items()}).contiguous()
        gradient, change = ((self._gradient if of is None else of).reshape(-1) for of in (self._gradient, self.change))
        return [each[None] for each in (gradient.dot(change), *map(torch.linalg.vector_norm, (gradient, change)))]

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        block = self._block
        take_in({p: gradients[p] for p in block.parameters}, states, names, of)
        state = states[block.weight]
        self._states, self.counts = [state], [int(state["step"])]
        self._momentum = block.matrix({p: states[p]["momentum"] for p in block.parameters})
        self.settle(states)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        state = states[self._block.weight]
        self.is_ready = [fits(state, self._gradient.shape)]
        if self.is_ready[0]:
            self.basis, self.moments = basis_of(state), state["moments"]

    def release(self) -> None:
        """See :meth:`Stack.release`."""
        self._gradient = self._momentum = self._nothing

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Stack.pair`."""
        return self._gradient, self._momentum

    def means(self) -> Tensor:
        """See :meth:`Stack.means`."""
        return self.basis.totals(self.moments).div_(math.prod(self._gradient.shape[1:]))

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        self._parts = {} if self.change is None else self._block.parts(self.change)
        return self._parts

    def turned(self) -> tuple[Turned, Turned]:
        """See :meth:`Stack.turned`."""
        return self.basis.turn(self._gradient), self.basis.turn(self._momentum)
