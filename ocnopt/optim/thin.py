"""Stacks of matrices that are wide on both sides."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ocnopt.optim.arrangement import Member
from ocnopt.optim.bases import Turned
from ocnopt.optim.several import Several


class Thin(Several):
    """Matrices of one size that are wide on both sides: of their gradients there is no copy."""

    def _allocate(self, like: Tensor) -> None:
        self._nothing = like.new_zeros(1, 1, 1)
        self._gradients: list[Tensor] = []

    def _receive(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member]) -> None:
        missing = self._nothing.expand_as(self.change)
        present = zip(self.blocks, self.slices, self.is_present, strict=True)
        self._gradients = [block.matrix(gradients) if is_here else missing[at] for block, at, is_here in present]

    def _compare(self) -> tuple[Tensor, Tensor]:
        pairs = [*zip(self._each(), self.change.flatten(1), strict=True)]
        products = [matrix.reshape(-1).dot(change) for matrix, change in pairs]
        return torch.stack(products), torch.stack(torch._foreach_norm([matrix for matrix, _ in pairs]))

    def _each(self) -> Iterator[Tensor]:
        """The gradient of each slice."""
        return itertools.chain.from_iterable(self._gradients)

    def release(self) -> None:
        """See :meth:`Stack.release`."""
        self._gradients = []

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Stack.pair`."""
        return self._gradients[i], self.momentum[self.slices[i]]

    def _turned_gradient(self) -> Turned:
        left, right = (self._beside(side) if part is None else part for side, part in enumerate(self._early))
        core = torch.bmm(left, self.basis.input.vectors, out=self._of_gradient[1])
        return Turned(self._nothing, left, core, right, self._norms.square()[:, None, None])

    def _beside(self, side: int) -> Tensor:
        (UA, *_), (UB, *_), found = *self.basis, self._of_gradient[2 * side]
        for i, matrix in enumerate(self._each()):
            torch.mm(*((matrix, UA[i]) if side else (UB[i].mT, matrix)), out=found[i])
        return found
