"""Stacks of matrices that are wide on one side at most, in common memory that pads smaller ones with zeros."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ocnopt.optim.arrangement import Member
from ocnopt.optim.bases import Basis, Turned
from ocnopt.optim.several import Several


class Narrow(Several):
    """Matrices that are wide on one side at most: their gradients are copied to lie beside one another."""

    def _allocate(self, like: Tensor) -> None:
        n, rows, columns = self.change.shape
        self._gradient = like.new_zeros(n, rows, columns)
        self._views_of_gradient: dict[Tensor, Tensor] = {}
        for place in self._places:
            self._views_of_gradient |= place.block.parts(place.matrix(self._gradient))
        self._used = [like.new_zeros(n, 1, d) for d in (columns, rows)]
        for place in self._places:
            for used, width in zip(self._used, reversed(place.lain), strict=True):
                used[place.at, :, :width] = 1.0

    def _receive(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member]) -> None:
        if len(here) < len(self._members):
            self._gradient.zero_()
        present = [member.parameter for member in here]
        torch._foreach_copy_([self._views_of_gradient[p] for p in present], [gradients[p] for p in present])

    def _compare(self) -> tuple[Tensor, Tensor]:
        products = (self._gradient * self.change).sum((1, 2))
        return products, torch.linalg.vector_norm(self._gradient, dim=(1, 2))

    def _blend(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member], weights: Sequence[float]) -> None:
        if self._newest is None:
            super()._blend(gradients, here, weights)
        else:
            self.momentum.lerp_(self._gradient, self._newest)

    def _take_into_factors(self, weight: float) -> None:
        for factor, turned in zip(self._factors, (self._gradient.mT, self._gradient), strict=True):
            if factor is not None:
                factor.baddbmm_(turned, turned.mT, beta=1.0 - weight, alpha=weight)

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Stack.pair`."""
        return self._places[i].matrix(self._gradient), self._places[i].matrix(self.momentum)

    def _followed(self, *, turns: bool) -> Basis:
        found = super()._followed(turns=turns)
        if not self.basis.is_complete:
            return found  # rows are not padded then, and what follows momenta has their zeros
        # in the padding they are unit vectors
        pairs = zip(found, self._used, strict=True)
        return Basis(*(side._replace(vectors=side.vectors * used) for side, used in pairs))

    def _turned_gradient(self) -> Turned:
        left, right = self._early
        return self.basis.turn(self._gradient, self._of_gradient, (left, right))

    def _beside(self, side: int) -> Tensor:
        (UA, *_), (UB, *_), G, out = *self.basis, self._gradient, self._of_gradient[2 * side]
        return torch.bmm(G, UA, out=out) if side else torch.bmm(UB.mT, G, out=out)
