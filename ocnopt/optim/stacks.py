"""Matrices that one iteration works on together, so that it makes as many calls for all of them as for one.

Shapes: a stack is ``(n, b, a)``, with n the groups of all its matrices, b and a the most of any of them. Matrices of
other sizes than the largest are padded with zeros, and may lie transposed; so are their eigenbases, second moments and
factors, and zeros stay zeros in all that is done to them. What is wide on a side, or has its factors from samples, has
an eigenbasis of its own kind, and is a stack of one.
"""

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.optim.arrangement import Bin, Place, arranged
from ocnopt.optim.bases import Basis, Eigen, Turned, is_wide
from ocnopt.optim.blocks import Block
from ocnopt.optim.states import BASIS, DECAY, TURNED, State, average, basis_of, fits, follow, newest, observe, take_in

KEPT = 2  # sets of matrices with gradients whose stacks are kept, as parts of a model may take turns

Groups = Mapping[Tensor, Mapping[str, Any]]
States = Mapping[Tensor, State]


class Stack:
    """Matrices of one precision and device, with all that an iteration needs of them.

    Attributes:
        blocks: the matrices.
        slices: where each is.
        gradient: ``(n, b, a)``, of this iteration.
        momentum: likewise.
        change: the last one, and memory for the next.
        moments: second moments, laid out as by ``basis``.
        basis: the eigenbases.
        is_ready: which matrices have one.
        is_changed: of which the last change is known.
    """

    gradient: Tensor
    momentum: Tensor
    change: Tensor | None
    moments: Tensor
    basis: Basis
    _states: list[State]  # of the weights
    _counts: list[int]  # of their gradients

    def __init__(self, blocks: Sequence[Block], like: Tensor) -> None:
        self.blocks = blocks
        self.is_ready, self.is_changed = ([False] * len(blocks) for _ in range(2))
        counts = [block.groups for block in blocks]
        self.slices = [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]
        self._sizes = like.new_tensor([float(block.groups * block.shape[1] * block.shape[2]) for block in blocks])
        self._owners: Tensor | None = None  # which matrix each slice is of, where that is not one of its own
        if max(counts) > 1:
            owners = [i for i, count in enumerate(counts) for _ in range(count)]
            self._owners = torch.tensor(owners, device=like.device)
            self._sorting = torch.nn.functional.one_hot(self._owners).to(like)

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """Take the gradients of an iteration into the momenta, given the options of each parameter."""
        raise NotImplementedError

    def settle(self, states: States) -> None:
        """Take up the eigenbases that the states hold now."""
        raise NotImplementedError

    def matrix(self, i: int, of: Tensor) -> Tensor:
        """The matrix of a block in something laid out as the stack."""
        raise NotImplementedError

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """The change of each parameter of a block."""
        raise NotImplementedError

    def turned(self) -> tuple[Turned, Turned]:
        """Gradient and momentum, turned."""
        raise NotImplementedError

    def observe(self) -> None:
        """Take the gradients into the running means of G^T G and G G^T, but for sides that are wide."""
        for i in range(len(self.blocks)):
            observe(self._states[i], self.matrix(i, self.gradient))

    def learn(self, squares: Tensor) -> None:
        """Take the squares of turned gradients into the second moments."""
        # what the moments began with counts as one observation
        weights = [newest(count + 1, DECAY) for count in self._counts]
        one = weights[0] if len({*weights}) == 1 else self.spread(squares.new_tensor(weights))
        self.moments.lerp_(squares, one)

    def sums(self, numbers: Tensor) -> Tensor:
        """Numbers ``(n,)`` of the slices, added up for each matrix."""
        return numbers if self._owners is None else numbers @ self._sorting

    def norms(self, numbers: Tensor) -> Tensor:
        """Norms ``(n,)`` of the slices, taken together for each matrix."""
        return numbers if self._owners is None else self.sums(numbers.square()).sqrt()

    def means(self) -> Tensor:
        """The mean second moment of each matrix: the trace of its curvature over its size."""
        return self.sums(self.basis.totals(self.moments)) / self._sizes

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each matrix beside its entries ``(n, 1, 1)``."""
        return (numbers if self._owners is None else numbers[self._owners])[:, None, None]

    def angles(self) -> Tensor:
        """Of gradient and last change of each matrix ``(3, matrices)``: their product, and the norms of both."""
        change = self.gradient if self.change is None else self.change
        sizes = [self.norms(torch.linalg.vector_norm(of, dim=(1, 2))) for of in (self.gradient, change)]
        return torch.stack([self.sums((self.gradient * change).sum((1, 2))), *sizes])


class Single(Stack):
    """One matrix, as its states hold it."""

    def __init__(self, block: Block, like: Tensor) -> None:
        super().__init__([block], like)
        self._block = block
        self._parts: dict[Tensor, Tensor] = {}
        self.change = None

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        block = self._block
        take_in({p: gradients[p] for p in block.parameters}, states, names, of)
        state = states[block.weight]
        self._states, self._counts = [state], [int(state["step"])]
        self._newest = newest(state["step"], of[block.weight]["momentum"])
        self.gradient = block.matrix(gradients)
        self.momentum = block.matrix({p: states[p]["momentum"] for p in block.parameters})
        changes: dict[Tensor, Tensor] = {p: states[p]["change"] for p in block.parameters if "change" in states[p]}
        self.is_changed = [len(changes) == len(block.parameters)]
        if not self.is_changed[0]:
            self.change = None
        elif any(change is not self._parts.get(p) for p, change in changes.items()):
            self.change = block.matrix(changes).contiguous()
        self.settle(states)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        state = states[self._block.weight]
        self.is_ready = [fits(state, self.gradient.shape)]
        if self.is_ready[0]:
            self.basis, self.moments = basis_of(state), state["moments"]

    def matrix(self, i: int, of: Tensor) -> Tensor:
        """See :meth:`Stack.matrix`."""
        return of

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        self._parts = {} if self.change is None else self._block.parts(self.change)
        return self._parts

    def angles(self) -> Tensor:
        """See :meth:`Stack.angles`; without the product of all entries in memory."""
        gradient, change = ((self.gradient if of is None else of).reshape(-1) for of in (self.gradient, self.change))
        return torch.stack([gradient.dot(change), *map(torch.linalg.vector_norm, (gradient, change))])[:, None]

    def turned(self) -> tuple[Turned, Turned]:
        """Gradient and momentum, turned.

        Where both sides are wide, the parts of the momentum are kept, as they follow those of the gradient until the
        basis changes: each product that is spared reads the whole matrix.
        """
        basis, state, gradient = self.basis, self._states[0], self.basis.turn(self.gradient)
        if not (basis.is_thin and is_wide(*self._block.shape[1:])):
            return gradient, basis.turn(self.momentum)
        if all(part in state for part in TURNED):
            parts = [state[part] for part in TURNED]
            torch._foreach_lerp_(parts, [part for part in gradient[1:] if part is not None], self._newest)
            return gradient, Turned(self.momentum, *parts)
        momentum = basis.turn(self.momentum)
        state.update(zip(TURNED, momentum[1:], strict=True))
        return gradient, momentum


class Several(Stack):
    """Matrices with complete eigenbases, in memory that their states hold views of.

    What is put in the place of a view, by load_state_dict, model.to or others, is taken up in the next iteration.
    """

    def __init__(self, bin_: Bin, like: Tensor) -> None:
        rows, columns, members = bin_
        super().__init__([block for block, _ in members], like)
        self._places = [Place(block, at, turn) for (block, turn), at in zip(members, self.slices, strict=True)]
        n = self.slices[-1].stop
        self._both = like.new_zeros(n, rows, 2, columns)
        self.gradient, self.momentum = self._both.unbind(2)
        self.moments, self.change = like.new_zeros(2, n, rows, columns)
        vectors, values, self._factors = ([like.new_zeros(n, *[d] * k) for d in (columns, rows)] for k in (2, 1, 2))
        self.basis = Basis(*(Eigen(*each) for each in zip(vectors, values, strict=True)))
        gradients, momenta, self._changes = map(self._parts, (self.gradient, self.momentum, self.change))
        self._gradients, self._momenta = [*gradients.values()], [*momenta.values()]
        self._steps = torch.zeros(len(momenta), dtype=torch.float32)
        self._members = [*zip(momenta, self._momenta, self._steps.unbind(), self._changes.values(), strict=True)]
        starts = itertools.accumulate((len(block.parameters) for block in self.blocks), initial=0)
        self._weights = [*starts][:-1]  # where each is among the members
        self._own = [self._views(place) for place in self._places]

    def _parts(self, of: Tensor) -> dict[Tensor, Tensor]:
        return {p: part for place in self._places for p, part in place.block.parts(place.matrix(of)).items()}

    def _views(self, place: Place) -> dict[str, Tensor]:
        """What the state of a weight holds, besides what each parameter's does."""
        _, b, a = place.block.shape
        views = {"moments": place.matrix(self.moments)}
        for i, (side, width) in enumerate((("input", a), ("output", b))):
            there = 1 - i if place.is_transposed else i
            vectors, values = (self.basis.input, self.basis.output)[there]
            for key, of in (("vectors", vectors), ("values", values), ("factor", self._factors[there])):
                views[f"{side}_{key}"] = place.side(of, width)
        return views

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        torch._foreach_copy_(self._gradients, [gradients[p] for p, *_ in self._members])
        changed: list[bool] = []
        for p, momentum, step, change in self._members:
            state = states[p]
            if state.get("momentum") is not momentum:
                follow(state, names[p], gradients[p])
                state["momentum"] = momentum.copy_(state.get("momentum", gradients[p]))
            if state.get("step") is not step:
                state["step"] = step.copy_(state.get("step", torch.zeros_like(step)))
            last = state.get("change")
            changed.append(last is not None)
            if last is not None and last is not change:
                change.copy_(last)
        self._steps += 1
        counts = self._steps.tolist()
        weights = [newest(count, of[p]["momentum"]) for count, (p, *_) in zip(counts, self._members, strict=True)]
        if len({*weights}) == 1:
            self.momentum.lerp_(self.gradient, weights[0])
        else:
            average(self._momenta, self._gradients, weights)
        self._states = [states[block.weight] for block in self.blocks]
        self._counts = [int(counts[i]) for i in self._weights]
        self.is_changed = [
            all(changed[i : i + len(block.parameters)]) for i, block in zip(self._weights, self.blocks, strict=True)
        ]
        self.settle(states)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        for i, (block, views) in enumerate(zip(self.blocks, self._own, strict=True)):
            state = states[block.weight]
            if all(map(operator.is_, map(state.get, BASIS), map(views.get, BASIS))):
                continue
            fitting = [state[key].shape == views[key].shape for key in BASIS if key in state]
            self.is_ready[i] = len(fitting) == len(BASIS) and all(fitting)
            for key in BASIS:
                if not self.is_ready[i]:
                    views[key].zero_()
                elif state[key] is not views[key]:
                    state[key] = views[key].copy_(state[key])

    def observe(self) -> None:
        """See :meth:`Stack.observe`."""
        for state, views in zip(self._states, self._own, strict=True):
            for key in ("input_factor", "output_factor"):
                if (own := state.get(key)) is not (view := views[key]):
                    state[key] = view.copy_(own) if own is not None and own.shape == view.shape else view.zero_()
        if len({*self._counts}) > 1:
            super().observe()
            return
        weight = newest(self._counts[0], DECAY)
        for factor, turned in zip(self._factors, (self.gradient.mT, self.gradient), strict=True):
            factor.baddbmm_(turned, turned.mT, beta=1.0 - weight, alpha=weight)

    def matrix(self, i: int, of: Tensor) -> Tensor:
        """See :meth:`Stack.matrix`."""
        return self._places[i].matrix(of)

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        return {p: self._changes[p] for p in self.blocks[i].parameters}

    def turned(self) -> tuple[Turned, Turned]:
        """See :meth:`Stack.turned`."""
        return self.basis.turn_both(self._both)


class Stacks:
    """The stacks of a model's matrices, kept from one iteration to the next.

    Args:
        blocks: the matrices.
        alone: weights of those whose eigenbases are of a kind of their own.
    """

    def __init__(self, blocks: Iterable[Block], alone: Collection[Tensor]) -> None:
        self._blocks, self._alone = [*blocks], alone
        self._kept: dict[Any, list[Stack]] = {}

    def of(self, gradients: Mapping[Tensor, Tensor]) -> list[Stack]:
        """Those of the matrices all of whose parameters have gradients."""
        present = [block for block in self._blocks if all(p in gradients for p in block.parameters)]
        found = [gradients[p] for block in present for p in block.parameters]
        key = (*map(id, present), *((gradient.dtype, gradient.device, gradient.shape) for gradient in found))
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = self._made(present, gradients)
        return self._kept[key]

    def _made(self, blocks: Sequence[Block], gradients: Mapping[Tensor, Tensor]) -> list[Stack]:
        stacks: list[Stack] = []
        kinds: dict[Any, list[Block]] = {}
        for block in blocks:
            like = gradients[block.weight]
            if block.weight in self._alone or is_wide(max(block.shape[1:])):
                stacks.append(Single(block, like))
            else:
                kinds.setdefault((like.dtype, like.device), []).append(block)
        for kind in kinds.values():
            stacks += [Several(each, gradients[kind[0].weight]) for each in arranged(kind)]
        return stacks
