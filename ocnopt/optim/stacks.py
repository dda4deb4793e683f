"""Matrices that one iteration works on together, so that it makes as many calls for all of them as for one.

Shapes: a stack is ``(n, b, a)``, with n the groups of all its matrices, b and a the most of any of them. Matrices of
other sizes than the largest are padded with zeros, and may lie transposed; so are their eigenbases, second moments and
factors, and zeros stay zeros in all that is done to them. What is wide on a side, or has its factors from samples, has
an eigenbasis of its own kind, and is a stack of one.
"""

import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.differential.kronecker import working_dtype
from ocnopt.optim.arrangement import Bin, Member, Place, arranged
from ocnopt.optim.bases import TURNING, Basis, Eigen, Turned, carried_moments, is_wide, tracked
from ocnopt.optim.blocks import Block
from ocnopt.optim.states import (
    BASIS,
    DECAY,
    TURNED,
    State,
    age,
    average,
    basis_of,
    fits,
    go_along,
    newest,
    observe,
    take_in,
)

Groups = Mapping[Tensor, Mapping[str, Any]]
States = Mapping[Tensor, State]


class Stack(ABC):
    """Matrices of one precision and device, with all that an iteration needs of them.

    Attributes:
        blocks: the matrices.
        slices: where each is.
        gradient: ``(n, b, a)``, of this iteration.
        momentum: likewise.
        change: the last one, and memory for the next.
        moments: second moments, laid out as by ``basis``.
        basis: the eigenbases.
        is_present: which matrices have gradients in this iteration; what is here of others stays as it is.
        is_ready: which of them have an eigenbasis.
        is_changed: of which of them the last change is known.
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
        self.is_present, self.is_ready, self.is_changed = ([False] * len(blocks) for _ in range(3))
        counts = [block.groups for block in blocks]
        self.slices = [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]
        self._sizes = like.new_tensor([float(block.groups * block.shape[1] * block.shape[2]) for block in blocks])
        self._owners: Tensor | None = None  # which matrix each slice is of, where that is not one of its own
        if max(counts) > 1:
            owners = [i for i, count in enumerate(counts) for _ in range(count)]
            self._owners = torch.tensor(owners, device=like.device)
            self._sorting = torch.nn.functional.one_hot(self._owners).to(like)

    def find(self, gradients: Mapping[Tensor, Tensor]) -> bool:
        """Whether there are gradients of all parameters of some of the matrices."""
        self.is_present = [all(p in gradients for p in block.parameters) for block in self.blocks]
        return any(self.is_present)

    @abstractmethod
    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """Take the gradients of an iteration into the momenta, given the options of each parameter."""

    @abstractmethod
    def settle(self, states: States) -> None:
        """Take up the eigenbases that the states hold now."""

    @abstractmethod
    def matrix(self, i: int, of: Tensor) -> Tensor:
        """The matrix of a block in something laid out as the stack."""

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
                observe(self._states[i], self.matrix(i, self.gradient))

    def follow(self) -> bool:
        """Let all eigenbases follow their factors together, if that can be done."""
        return False

    def release(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the gradients, at the end of an iteration."""

    def learn(self, squares: Tensor) -> None:
        """Take the squares of turned gradients into the second moments."""
        # what the moments began with counts as one observation
        weights = [newest(n + 1, DECAY) if here else 0.0 for n, here in zip(self._counts, self.is_present, strict=True)]
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
        self._block, self._nothing = block, like
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

    def release(self) -> None:
        """See :meth:`Stack.release`."""
        self.gradient = self.momentum = self._nothing

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
        self.moments, change = like.new_zeros(2, n, rows, columns)
        self.change = change
        vectors, values, self._factors = ([like.new_zeros(n, *[d] * k) for d in (columns, rows)] for k in (2, 1, 2))
        self.basis = Basis(*(Eigen(*each) for each in zip(vectors, values, strict=True)))
        self._steps = torch.zeros(sum(len(block.parameters) for block in self.blocks), dtype=torch.float32)
        self._members = [*self._made(self.gradient, self.momentum, change)]
        self._changes: list[dict[Tensor, Tensor]] = [{} for _ in self.blocks]
        for member in self._members:
            self._changes[member.owner][member.parameter] = member.change
        self._weights = [next(m.number for m in self._members if m.parameter is block.weight) for block in self.blocks]
        self._own = [self._views(place) for place in self._places]
        self._used = [like.new_zeros(n, 1, d) for d in (columns, rows)]
        for place, (_, b, a) in zip(self._places, (block.shape for block in self.blocks), strict=True):
            for used, width in zip(self._used, (b, a) if place.is_transposed else (a, b), strict=True):
                used[place.at, :, :width] = 1.0

    def _made(self, *of: Tensor) -> Iterator[Member]:
        steps = enumerate(self._steps.unbind())
        for i, place in enumerate(self._places):
            parts = [place.block.parts(place.matrix(each)) for each in of]
            for parameter in place.block.parameters:
                gradient, momentum, change = (part[parameter] for part in parts)
                yield Member(parameter, i, *next(steps), gradient, momentum, change)

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
        here = [member for member in self._members if self.is_present[member.owner]]
        if len(here) < len(self._members):
            self.gradient.zero_()
        torch._foreach_copy_([member.gradient for member in here], [gradients[member.parameter] for member in here])
        self.is_changed = [*self.is_present]
        for member in here:
            state, gradient = states[member.parameter], gradients[member.parameter]
            if state.get("momentum") is not member.momentum:
                go_along(state, names[member.parameter], gradient)
                state["momentum"] = member.momentum.copy_(state.get("momentum", gradient))
            if state.get("step") is not member.step:
                state["step"] = member.step.copy_(state.get("step", torch.zeros(())))
            if (change := state.get("change")) is None:
                self.is_changed[member.owner] = False
            elif change is not member.change:
                member.change.copy_(change)
        self._states = [states[block.weight] for block in self.blocks]
        self._advance(here, of)
        self.settle(states)

    def _advance(self, here: Sequence[Member], of: Groups) -> None:
        """Count the gradients, and take them into the momenta."""
        is_whole = len(here) == len(self._members)
        torch._foreach_add_([self._steps] if is_whole else [member.step for member in here], 1.0)
        counts = self._steps.tolist()
        weights = [newest(counts[member.number], of[member.parameter]["momentum"]) for member in here]
        self._counts = [int(counts[number]) for number in self._weights]
        if is_whole and len({*weights}) == 1:
            self.momentum.lerp_(self.gradient, weights[0])
        else:
            average([member.momentum for member in here], [member.gradient for member in here], weights)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        for i, (block, views) in enumerate(zip(self.blocks, self._own, strict=True)):
            state = states[block.weight]
            if not self.is_present[i] or all(map(operator.is_, map(state.get, BASIS), map(views.get, BASIS))):
                self.is_ready[i] = self.is_present[i]
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
        for i, views in enumerate(self._own):
            for key in ("input_factor", "output_factor") if self.is_present[i] else ():
                own, view = self._states[i].get(key), views[key]
                if own is not view:
                    view.copy_(own) if own is not None and own.shape == view.shape else view.zero_()
                    self._states[i][key] = view
        if len({*self._counts}) > 1 or not all(self.is_present):
            super().observe()
            return
        weight = newest(self._counts[0], DECAY)
        for factor, turned in zip(self._factors, (self.gradient.mT, self.gradient), strict=True):
            factor.baddbmm_(turned, turned.mT, beta=1.0 - weight, alpha=weight)

    def follow(self) -> bool:
        """See :meth:`Stack.follow`."""
        if not (all(self.is_present) and all(self.is_ready)) or min(map(age, self._states)) < TURNING:
            return False
        found = [tracked(factor, old.vectors) for factor, old in zip(self._factors, self.basis, strict=True)]
        # in the padding they are unit vectors
        new = Basis(*(Eigen(each.vectors * used, each.values) for each, used in zip(found, self._used, strict=True)))
        self.moments.copy_(carried_moments(self.moments, self.basis, new))
        for side, own in zip(new, self.basis, strict=True):
            own.vectors.copy_(side.vectors)
            own.values.copy_(side.values)
        return True

    def matrix(self, i: int, of: Tensor) -> Tensor:
        """See :meth:`Stack.matrix`."""
        return self._places[i].matrix(of)

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        return self._changes[i]

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
        self._stacks: list[Stack] = []
        self._made_for: list[Any] = []

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> list[Stack]:
        """Take the gradients of an iteration into all momenta; the stacks that have all of some matrix."""
        kinds = [(p.dtype, p.device, p.shape) for block in self._blocks for p in block.parameters]
        if kinds != self._made_for:
            self._made_for, self._stacks = kinds, [*self._made()]
        found, loose = [stack for stack in self._stacks if stack.find(gradients)], {**gradients}
        for stack in found:
            stack.take_in(gradients, states, names, of)
            for block in itertools.compress(stack.blocks, stack.is_present):
                for parameter in block.parameters:
                    del loose[parameter]
        take_in(loose, states, names, of)
        return found

    def _made(self) -> Iterator[Stack]:
        kinds: dict[Any, list[Block]] = {}
        for block in self._blocks:
            kind = working_dtype(block.weight), block.weight.device
            if block.weight in self._alone or is_wide(max(block.shape[1:])):
                yield Single(block, torch.empty(0, dtype=kind[0], device=kind[1]))
            else:
                kinds.setdefault(kind, []).append(block)
        for (dtype, device), blocks in kinds.items():
            for bin_ in arranged(blocks):
                yield Several(bin_, torch.empty(0, dtype=dtype, device=device))
