"""Stacks of several matrices, in memory that their states hold views of.

Matrices of other sizes than the largest are padded with zeros, and may lie transposed; so are their eigenbases, second
moments and factors, and zeros stay zeros in all that is done to them. Matrices with a wide side are not padded. What is
put in the place of a view, by load_state_dict, model.to or others, is taken up in the next iteration.
"""

import itertools
import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.optim.arrangement import Bin, Member, Place
from ocnopt.optim.bases import (
    TURNING,
    Basis,
    Eigen,
    Turned,
    carried_moments,
    follow,
    is_wide,
    kept,
    matrix_norms,
    tracked,
)
from ocnopt.optim.blocks import Block
from ocnopt.optim.stack import Groups, Stack, States
from ocnopt.optim.states import (
    BASIS,
    DECAY,
    FACTORS,
    TURNED,
    State,
    adopt,
    age,
    average,
    go_along,
    is_turn_of_output,
    newest,
    renewed,
)


class Several(Stack):
    """Matrices whose eigenbases are made of their gradients.

    Args:
        bin_: the matrices, and where they lie.
        like: of their precision and device.
    """

    momentum: Tensor  # (n, b, a)
    change: Tensor

    def __init__(self, bin_: Bin, like: Tensor) -> None:
        rows, columns, members = bin_
        super().__init__([block for block, _ in members], like)
        self._places = [Place(block, at, turn) for (block, turn), at in zip(members, self.slices, strict=True)]
        n, q, r = self.slices[-1].stop, kept(rows, columns), kept(columns, rows)
        self._newest: float | None = None  # the weight of the gradients in all momenta, if it is the same
        self.change = like.new_zeros(n, rows, columns)
        self.moments = like.new_zeros(n, q + (q < rows), r + (r < columns))
        sides = ((columns, r), (rows, q))
        self.basis = Basis(*(Eigen(like.new_zeros(n, d, k), like.new_zeros(n, k)) for d, k in sides))
        self._factors = [None if is_wide(d) else like.new_zeros(n, d, d) for d, _ in sides]
        self._allocate(like)
        self._norms = like.new_zeros(n)  # of gradients
        self._steps = torch.zeros(sum(len(block.parameters) for block in self.blocks), dtype=torch.float32)
        self._members = [*self._made()]
        self._changes: list[dict[Tensor, Tensor]] = [{} for _ in self.blocks]
        for member in self._members:
            self._changes[member.owner][member.parameter] = member.change
        self._weights = [next(m.number for m in self._members if m.parameter is block.weight) for block in self.blocks]
        self._own = [self._views(place) for place in self._places]

    @abstractmethod
    def _allocate(self, like: Tensor) -> None:
        """Make room for the momentum, and what is needed besides."""

    @abstractmethod
    def _receive(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member]) -> None:
        """Take gradients to hand."""

    @abstractmethod
    def _compare(self) -> tuple[Tensor, Tensor]:
        """Products of gradients and changes ``(n,)``, and the norms of gradients ``(n,)``."""

    def _made(self) -> Iterator[Member]:
        steps = enumerate(self._steps.unbind())
        for i, place in enumerate(self._places):
            momentum, change = (place.block.parts(place.matrix(of)) for of in (self.momentum, self.change))
            for parameter in place.block.parameters:
                yield Member(parameter, i, *next(steps), momentum[parameter], change[parameter])

    def _views(self, place: Place) -> dict[str, Tensor]:
        """What the state of a weight holds, besides what each parameter's does."""
        _, b, a = place.block.shape
        views = {"moments": place.matrix(self.moments)}
        for i, (side, width) in enumerate((("input", a), ("output", b))):
            there = 1 - i if place.is_transposed else i
            vectors, values = (self.basis.input, self.basis.output)[there]
            for key, of in (("vectors", vectors), ("values", values), ("factor", self._factors[there])):
                if of is not None:
                    views[f"{side}_{key}"] = place.side(of, width)
        return views

    def gather(self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]) -> Tensor:
        """See :meth:`Stack.gather`."""
        here = [member for member in self._members if self.is_present[member.owner]]
        self._receive(gradients, here)
        self.is_changed, others = [*self.is_present], []
        for member in here:
            state = states.get(member.parameter, {})
            if (change := state.get("change")) is None:
                self.is_changed[member.owner] = False
            elif change is not member.change:
                go_along(state, names[member.parameter], gradients[member.parameter])
                others.append((state, "change", member.change, change))
        adopt(others)
        products, self._norms = self._compare()
        return torch.stack([products, self._norms, matrix_norms(self.change)])

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        here = [member for member in self._members if self.is_present[member.owner]]
        others = []
        for member in here:
            state, gradient = states[member.parameter], gradients[member.parameter]
            if (momentum := state.get("momentum")) is not member.momentum:
                go_along(state, names[member.parameter], gradient)
                others.append((state, "momentum", member.momentum, gradient if momentum is None else momentum))
            if (step := state.get("step")) is not member.step:
                others.append((state, "step", member.step, torch.zeros(()) if step is None else step))
        adopt(others)
        self._states = [states[block.weight] for block in self.blocks]
        self._blend(gradients, here, self._advance(here, of))
        self.settle(states)

    def _advance(self, here: Sequence[Member], of: Groups) -> list[float]:
        """Count the gradients; the weights of these in the momenta."""
        is_whole = len(here) == len(self._members)
        if is_whole:
            self._steps.add_(1.0)
        else:
            torch._foreach_add_([member.step for member in here], 1.0)
        counts = self._steps.tolist()
        weights = [newest(counts[member.number], of[member.parameter]["momentum"]) for member in here]
        self._counts = [int(counts[number]) for number in self._weights]
        self._newest = weights[0] if is_whole and len({*weights}) == 1 else None
        return weights

    def _blend(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member], weights: Sequence[float]) -> None:
        """Take gradients into the momenta."""
        average([member.momentum for member in here], [gradients[member.parameter] for member in here], weights)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        others = []
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
                    others.append((state, key, views[key], state[key]))
        adopt(others)

    def observe(self) -> None:
        """See :meth:`Stack.observe`."""
        others = []
        for i, views in enumerate(self._own):
            state = self._states[i]
            for key in FACTORS if self.is_present[i] else ():
                own, view = state.get(key), views.get(key)
                if view is None:
                    state.pop(key, None)
                elif own is not view:
                    known = own if own is not None and own.shape == view.shape else torch.zeros_like(view)
                    others.append((state, key, view, known))
        adopt(others)
        if len({*self._counts}) > 1 or not all(self.is_present):
            super().observe()
            return
        self._take_into_factors(newest(self._counts[0], DECAY))

    def _take_into_factors(self, weight: float) -> None:
        """Take the gradients of all matrices into their running means."""

    def follow(self) -> bool:
        """See :meth:`Stack.follow`."""
        turns = {is_turn_of_output(state, *self.change.shape[1:]) for state in self._states}
        if not (all(self.is_present) and all(self.is_ready)) or len(turns) > 1:
            return False
        has_factors = any(factor is not None for factor in self._factors)
        if has_factors and min(map(age, self._states)) < TURNING:
            return False
        new = self._followed(turns=turns.pop())
        self.moments.copy_(carried_moments(self.moments, self.basis, new))
        for side, own in zip(new, self.basis, strict=True):
            if side is not own:
                own.vectors.copy_(side.vectors)
                own.values.copy_(side.values)
        for state in self._states if is_wide(self.change.shape[2]) else ():
            renewed(state)
        return True

    def _followed(self, *, turns: bool) -> Basis:
        """Bases that follow their factors; of matrices with a wide side those of one side: of B if it ``turns``."""
        (UA, UB), (A, B) = self.basis, self._factors
        if A is not None and B is not None:
            return Basis(tracked(A, UA.vectors), tracked(B, UB.vectors))
        if not turns:
            return Basis(follow(self.momentum, UA, UB.leading()), UB)
        return Basis(UA, follow(self.momentum.mT, UB, UA.leading()) if B is None else tracked(B, UB.vectors))

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        return self._changes[i]


class Narrow(Several):
    """Matrices that are wide on one side at most."""

    def _allocate(self, like: Tensor) -> None:
        n, rows, columns = self.change.shape
        self._both = like.new_zeros(n, rows, 2, columns)
        self._gradient, self.momentum = self._both.unbind(2)
        self._views_of_gradient: dict[Tensor, Tensor] = {}
        for place in self._places:
            self._views_of_gradient |= place.block.parts(place.matrix(self._gradient))
        self._used = [like.new_zeros(n, 1, d) for d in (columns, rows)]
        for place, (_, b, a) in zip(self._places, (block.shape for block in self.blocks), strict=True):
            for used, width in zip(self._used, (b, a) if place.is_transposed else (a, b), strict=True):
                used[place.at, :, :width] = 1.0

    def _receive(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member]) -> None:
        if len(here) < len(self._members):
            self._gradient.zero_()
        present = [member.parameter for member in here]
        torch._foreach_copy_([self._views_of_gradient[p] for p in present], [gradients[p] for p in present])

    def _compare(self) -> tuple[Tensor, Tensor]:
        return (self._gradient * self.change).sum((1, 2)), matrix_norms(self._gradient)

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
            return found
        # in the padding they are unit vectors
        return Basis(*(Eigen(each.vectors * used, each.values) for each, used in zip(found, self._used, strict=True)))

    def turned(self) -> tuple[Turned, Turned]:
        """See :meth:`Stack.turned`."""
        return self.basis.turn_both(self._both)


class Thin(Several):
    """Matrices of one size that are wide on both sides.

    The turned parts of the momentum are kept, as they follow those of the gradient until the basis changes: each
    product that is spared reads the whole matrix.
    """

    def _allocate(self, like: Tensor) -> None:
        n, rows, columns = self.change.shape
        (_, _, r), (_, _, q) = (side.vectors.shape for side in self.basis)
        self.momentum, self._nothing = like.new_zeros(n, rows, columns), like.new_zeros(1, 1, 1)
        self._gradients: list[Tensor] = []  # as they are: a copy would take as much memory as the parameters
        shapes = (q, columns), (q, r), (rows, r)
        self._flat = like.new_zeros(2, n * sum(height * width for height, width in shapes))
        parts = self._flat.split([n * height * width for height, width in shapes], 1)
        self._parts = [part.view(2, n, *shape) for part, shape in zip(parts, shapes, strict=True)]
        self._follows = False  # whether the turned parts of the momentum are those of the last one
        self._versions: list[int] = []
        self._turned = [dict(zip(TURNED, (part[1, at] for part in self._parts), strict=True)) for at in self.slices]

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

    def turned(self) -> tuple[Turned, Turned]:
        """See :meth:`Stack.turned`."""
        (UA, _), (UB, _), (left, core, right) = *self.basis, self._parts
        for i, matrix in enumerate(self._each()):
            torch.mm(UB[i].mT, matrix, out=left[0, i])
            torch.mm(matrix, UA[i], out=right[0, i])
        torch.bmm(left[0], UA, out=core[0])
        if self._newest is not None and self._follows:
            self._flat[1].lerp_(self._flat[0], self._newest)
        else:
            torch.bmm(UB.mT, self.momentum, out=left[1])
            torch.bmm(left[1], UA, out=core[1])
            torch.bmm(self.momentum, UA, out=right[1])
        for state, own, is_ready in zip(self._states, self._turned, self.is_ready, strict=True):
            if is_ready:
                state.update(own)
        self._versions = self._versions_now()
        total = self._norms.square()[:, None, None]
        return Turned(self._nothing, left[0], core[0], right[0], total), Turned(
            self.momentum, left[1], core[1], right[1]
        )

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        follows = all(self.is_present) and self._are_kept([states[block.weight] for block in self.blocks])
        for block in self.blocks:
            for key in TURNED:  # until the change is made: an iteration may be interrupted
                states[block.weight].pop(key, None)
        super().take_in(gradients, states, names, of)
        self._follows = follows and all(self.is_ready)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        pairs = zip(self.blocks, self._own, strict=True)
        own = [states[block.weight].get(key) is views[key] for block, views in pairs for key in BASIS]
        self._follows = self._follows and all(own)
        super().settle(states)

    def follow(self) -> bool:
        """See :meth:`Stack.follow`."""
        has_followed = super().follow()
        self._follows = self._follows and not has_followed
        return has_followed

    def _are_kept(self, states: Sequence[State]) -> bool:
        """Whether states hold turned parts that belong to their momenta and bases: as they were left, or all loaded."""
        pairs: list[tuple[State, str, Tensor, Any]] = []
        for state, number, own, parts in zip(states, self._weights, self._own, self._turned, strict=True):
            views = {"momentum": self._members[number].momentum, **{key: own[key] for key in BASIS}, **parts}
            pairs += [(state, key, view, state.get(key)) for key, view in views.items()]
        if all(value is view for _, _, view, value in pairs):
            return self._versions_now() == self._versions
        others = [(state, key, view, value) for state, key, view, value in pairs if isinstance(value, Tensor)]
        if len(others) < len(pairs) or any(value is view or value.shape != view.shape for _, _, view, value in others):
            return False
        if not all(map(_belong, states, self.blocks)):
            return False
        adopt([other for other in others if other[1] in TURNED])
        return True

    def _versions_now(self) -> list[int]:
        """What is counted up as momenta and eigenvectors are edited where they are."""
        return [tensor._version for tensor in (self.momentum, *(side.vectors for side in self.basis))]


def _belong(state: State, block: Block) -> bool:
    """Whether turned parts are those of the momentum beside them: a state may be edited before it is loaded."""
    M, (left, _, right) = block.matrix({block.weight: state["momentum"]}), (state[key] for key in TURNED)
    off = (state["output_vectors"].mT @ M - left).norm(), (M @ state["input_vectors"] - right).norm()
    return bool(max(off) <= torch.finfo(M.dtype).eps ** 0.5 * M.norm())
