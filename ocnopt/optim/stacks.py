"""Matrices that one iteration works on together, so that it makes as many calls for all of them as for one.

Shapes: a stack is ``(n, b, a)``, with n the groups of all its matrices, b and a the most of any of them. Matrices of
other sizes than the largest are padded with zeros, and may lie transposed; so are their eigenbases, second moments and
factors, and zeros stay zeros in all that is done to them. What is wide on a side, or has its factors from samples, has
an eigenbasis of its own kind, and is a stack of one.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.optim.bases import Basis, Eigen, Turned, is_wide
from ocnopt.optim.blocks import Block
from ocnopt.optim.states import DECAY, TURNED, State, average, fits, follow, newest, take_in

PADDING = 2**18  # of work(), what a matrix may do in vain to be in a stack: about what the calls of another one take
KEPT = 2  # sets of matrices with gradients whose stacks are kept, as parts of a model may take turns

_BASIS = ("input_vectors", "input_values", "output_vectors", "output_values", "moments")

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
            self._members = torch.nn.functional.one_hot(self._owners).to(like)

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
        return numbers if self._owners is None else numbers @ self._members

    def norms(self, numbers: Tensor) -> Tensor:
        """Norms ``(n,)`` of the slices, taken together for each matrix."""
        return numbers if self._owners is None else self.sums(numbers.square()).sqrt()

    def means(self) -> Tensor:
        """The mean second moment of each matrix: the trace of its curvature over its size."""
        return self.sums(self.basis.totals(self.moments)) / self._sizes

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each matrix beside its entries ``(n, 1, 1)``."""
        return (numbers if self._owners is None else numbers[self._owners])[:, None, None]

    def cosines(self) -> Tensor:
        """Of the angle between gradient and last change of each matrix; 0 where one of them is zero."""
        change = self.gradient if self.change is None else self.change
        tiny = torch.finfo(change.dtype).tiny
        gradients, changes = (self.norms(torch.linalg.vector_norm(of, dim=(1, 2))) for of in (self.gradient, change))
        products = self.sums((self.gradient * change).sum((1, 2)))
        return products.div_(gradients.clamp_(min=tiny)).div_(changes.clamp_(min=tiny))


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
        changes = {p: states[p]["change"] for p in block.parameters if "change" in states[p]}
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
        self._parts = self._block.parts(self.change)
        return self._parts

    def turned(self) -> tuple[Turned, Turned]:
        """Gradient and momentum, turned.

        Where both sides are wide, the parts of the momentum are kept, as they follow those of the gradient until the
        basis changes: each product that is spared reads the whole matrix.
        """
        basis, state, gradient = self.basis, self._states[0], self.basis.turn(self.gradient)
        if not basis.is_thin:
            return gradient, basis.turn(self.momentum)
        if all(part in state for part in TURNED):
            parts = [state[part] for part in TURNED]
            torch._foreach_lerp_(parts, [part for part in gradient[1:] if part is not None], self._newest)
            return gradient, Turned(self.momentum, *parts)
        momentum = basis.turn(self.momentum)
        state.update(zip(TURNED, momentum[1:], strict=True))
        return gradient, momentum


class Place(NamedTuple):
    """Where a matrix lies in a stack of several: in which slices, and whether transposed."""

    block: Block
    at: slice
    is_transposed: bool

    def matrix(self, of: Tensor) -> Tensor:
        """The matrix there."""
        rows, columns = self.block.shape[1:]
        return of[self.at, :columns, :rows].mT if self.is_transposed else of[self.at, :rows, :columns]

    def side(self, of: Tensor, width: int) -> Tensor:
        """What belongs to one side, ``(groups, width, ..., width)``, there."""
        return of[(self.at, *[slice(width)] * (of.ndim - 1))]


class Several(Stack):
    """Matrices with complete eigenbases, in memory that their states hold views of.

    What is put in the place of a view, by load_state_dict, model.to or others, is taken up in the next iteration.
    """

    def __init__(self, bin: "Bin", like: Tensor) -> None:
        rows, columns, members = bin
        super().__init__([block for block, _ in members], like)
        self._places = [Place(block, at, turn) for (block, turn), at in zip(members, self.slices, strict=True)]
        n = self.slices[-1].stop
        self._both = like.new_zeros(n, rows, 2, columns)
        self.gradient, self.momentum = self._both.unbind(2)
        self.moments, self.change = like.new_zeros(2, n, rows, columns)
        vectors, values, self._factors = ([like.new_zeros(n, *[d] * k) for d in (columns, rows)] for k in (2, 1, 2))
        self.basis = Basis(*(Eigen(*each) for each in zip(vectors, values, strict=True)))
        parameters = [p for block in self.blocks for p in block.parameters]
        self._steps = torch.zeros(len(parameters), dtype=torch.float32)
        self._step = dict(zip(parameters, self._steps.unbind(), strict=True))
        self._gradients, self._momenta, self._changes = (
            {p: part for place in self._places for p, part in place.block.parts(place.matrix(of)).items()}
            for of in (self.gradient, self.momentum, self.change)
        )
        self._own = [self._views(place) for place in self._places]

    def _views(self, place: Place) -> dict[str, Tensor]:
        """What the state of a weight holds, besides what each parameter's does."""
        _, b, a = place.block.shape
        views = {"moments": place.matrix(self.moments)}
        order = slice(None, None, -1) if place.is_transposed else slice(None)
        for side, width, basis, factor in zip(
            ("input", "output"), (a, b), self.basis[order], self._factors[order], strict=True
        ):
            views[f"{side}_vectors"] = place.side(basis.vectors, width)
            views[f"{side}_values"] = place.side(basis.values, width)
            views[f"{side}_factor"] = place.side(factor, width)
        return views

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        for p, momentum in self._momenta.items():
            state = states[p]
            if state.get("momentum") is not momentum:
                follow(state, names[p], gradients[p])
                momentum.copy_(state.get("momentum", gradients[p]))
                state["momentum"] = momentum
            if state.get("step") is not (step := self._step[p]):
                state["step"] = step.copy_(state.get("step", torch.zeros_like(step)))
        torch._foreach_copy_([*self._gradients.values()], [gradients[p] for p in self._gradients])
        self._steps += 1
        counts = dict(zip(self._step, self._steps.tolist(), strict=True))
        weights = [newest(count, of[p]["momentum"]) for p, count in counts.items()]
        if len({*weights}) == 1:
            self.momentum.lerp_(self.gradient, weights[0])
        else:
            average([*self._momenta.values()], [*self._gradients.values()], weights)
        self._states = [states[block.weight] for block in self.blocks]
        self._counts = [int(counts[block.weight]) for block in self.blocks]
        for i, block in enumerate(self.blocks):
            self.is_changed[i] = all("change" in states[p] for p in block.parameters)
            for p in block.parameters if self.is_changed[i] else ():
                if (change := states[p]["change"]) is not self._changes[p]:
                    self._changes[p].copy_(change)
        self.settle(states)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        for i, (block, views) in enumerate(zip(self.blocks, self._own, strict=True)):
            state = states[block.weight]
            fitting = [state[key].shape == views[key].shape for key in _BASIS if key in state]
            self.is_ready[i] = len(fitting) == len(_BASIS) and all(fitting)
            for key in _BASIS:
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


def observe(state: State, gradient: Tensor) -> None:
    """Take a gradient into the running means of G^T G and G G^T, but for sides that are wide."""
    weight = newest(state["step"], DECAY)
    for side, turned in (("input_factor", gradient.mT), ("output_factor", gradient)):
        groups, width, _ = turned.shape
        if is_wide(width):
            state.pop(side, None)
            continue
        if side not in state or state[side].shape != (groups, width, width):
            state[side] = gradient.new_zeros(groups, width, width)
        state[side].baddbmm_(turned, turned.mT, beta=1.0 - weight, alpha=weight)


def basis_of(state: Mapping[str, Any]) -> Basis:
    """The eigenbasis that the state of a weight holds."""
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )


class Stacks:
    """The stacks of a model's matrices, kept from one iteration to the next.

    Args:
        blocks: the matrices.
        is_alone: whether one has an eigenbasis of its own kind.
    """

    def __init__(self, blocks: Iterable[Block], is_alone: Callable[[Block], bool]) -> None:
        self._blocks, self._is_alone = [*blocks], is_alone
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
            if self._is_alone(block) or is_wide(max(block.shape[1:])):
                stacks.append(Single(block, like))
            else:
                kinds.setdefault((like.dtype, like.device), []).append(block)
        for kind in kinds.values():
            stacks += [Several(bin, gradients[kind[0].weight]) for bin in arranged(kind)]
        return stacks


class Bin(NamedTuple):
    """Matrices that lie in one stack, with its rows and columns, and whether each is transposed there."""

    rows: int
    columns: int
    members: tuple[tuple[Block, bool], ...]

    def joined(self, block: Block) -> "Bin | None":
        """Also with another matrix; None if too much would be done in vain."""
        _, b, a = block.shape
        for is_transposed in (b > a, b <= a):
            own = (a, b) if is_transposed else (b, a)
            wider = Bin(max(self.rows, own[0]), max(self.columns, own[1]), (*self.members, (block, is_transposed)))
            if wider.is_good():
                return wider
        return None

    def is_good(self) -> bool:
        """Whether each matrix may lie there."""
        own = _work(self.rows, self.columns)
        for (groups, b, a), is_transposed in ((block.shape, is_transposed) for block, is_transposed in self.members):
            # the parts of several groups are views, in which the groups are one behind the other
            if groups * (own - _work(b, a)) > PADDING or (groups > 1 and (is_transposed or b < self.rows)):
                return False
        return True


def arranged(blocks: Iterable[Block]) -> list[Bin]:
    """Matrices in as few stacks as is worth it, each time in the first one that takes them, the largest first."""
    found: list[Bin] = []
    for block in sorted(blocks, key=lambda block: -_work(*block.shape[1:])):
        for i, one in enumerate(found):
            if (wider := one.joined(block)) is not None:
                found[i] = wider
                break
        else:
            groups, rows, columns = block.shape
            is_transposed = groups == 1 and rows > columns
            found.append(Bin(*((columns, rows) if is_transposed else (rows, columns)), ((block, is_transposed),)))
    return found


def _work(rows: int, columns: int) -> int:
    """Of the products with the eigenvectors of both sides."""
    return rows * columns * (rows + columns)
