"""Stacks of several matrices, in memory that their states hold views of.

Matrices of other sizes than the largest are padded with zeros, and may lie transposed; so are their eigenbases, second
moments and factors, and zeros stay zeros in all that is done to them. Matrices that are wide on both sides are not
padded, and of those that are wide on one the columns alone. What is put in the place of a view, by load_state_dict,
model.to or others, is taken up in the next iteration.
"""

import itertools
import math
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
    tracked,
)
from ocnopt.optim.stack import Groups, Stack, States, kind_of
from ocnopt.optim.states import (
    BASIS,
    DECAY,
    FACTORS,
    TURNED,
    State,
    adopt,
    age,
    average,
    basis_of,
    go_along,
    is_changed_together,
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
        self.momentum, self.change = (like.new_zeros(n, rows, columns) for _ in range(2))
        self.moments = like.new_zeros(n, q + (q < rows), r + (r < columns))
        sides = ((columns, r), (rows, q))
        own = [[float(side) for side in place.lain] for place in self._places]
        heights, widths = (like.new_tensor(self.of_slices(each))[:, None, None] for each in zip(*own, strict=True))
        A, B = (Eigen(like.new_zeros(n, d, k), like.new_zeros(n, k)) for d, k in sides)
        is_padded = r < columns and min(width for _, width in own) < columns
        self.basis = Basis(A._replace(rests=widths - r) if is_padded else A, B)
        self._shares = self.basis.multiplicities() / (heights * widths)
        self._factors = [None if is_wide(d) else like.new_zeros(n, d, d) for d, _ in sides]
        self._allocate_turned(like, ((q, columns), (q, r), (rows, r)), (r < columns, True, q < rows))
        self._allocate(like)
        self._norms = like.new_zeros(n)  # of gradients
        self._steps = torch.zeros(sum(len(block.parameters) for block in self.blocks), dtype=torch.float32)
        self._members = [*self._made()]
        self._changes: list[dict[Tensor, Tensor]] = [{} for _ in self.blocks]
        for member in self._members:
            self._changes[member.owner][member.parameter] = member.change
        self._weights = [next(m.number for m in self._members if m.parameter is block.weight) for block in self.blocks]
        self._own = [self._views(place) for place in self._places]
        self._turned = [self._turned_views(place) for place in self._places]
        self._expected = [*self._all_views()]
        self._is_left = False  # whether the states hold all views, as the last iteration left them

    def _allocate_turned(self, like: Tensor, shapes: Sequence[tuple[int, int]], are_used: Sequence[bool]) -> None:
        """Make room for what the basis makes of gradients and momenta: of each the parts that :class:`Turned` has."""
        sizes = [len(self.change) * math.prod(shape) * is_used for shape, is_used in zip(shapes, are_used, strict=True)]
        flat = like.new_zeros(2, sum(sizes))
        parts = [
            part.view(2, -1, *shape).unbind() if is_used else (None, None)
            for part, shape, is_used in zip(flat.split(sizes, 1), shapes, are_used, strict=True)
        ]
        (self._of_gradient, self._of_momentum), self._flat = zip(*parts, strict=True), flat.unbind()
        # whether the turned parts of the momentum, left and right, are those of the last one
        self._follows = (False, False)
        self._early: list[Tensor | None] = [None, None]  # those of the gradient where they are made, and taken in
        self._versions: list[object] = []

    @abstractmethod
    def _allocate(self, like: Tensor) -> None:
        """Make room for what is needed besides."""

    @abstractmethod
    def _receive(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member]) -> None:
        """Take gradients to hand."""

    @abstractmethod
    def _turned_gradient(self) -> Turned:
        """The gradients, turned, in the memory for it, where some parts may be already."""

    @abstractmethod
    def _beside(self, side: int) -> Tensor:
        """U_B^T G (0) or G U_A (1) of the gradients, in the memory for it."""

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
            vectors, values, _ = self.basis[there]
            for key, of in (("vectors", vectors), ("values", values), ("factor", self._factors[there])):
                if of is not None:
                    views[f"{side}_{key}"] = place.side(of, width)
        return views

    def _turned_views(self, place: Place) -> dict[str, Tensor]:
        """The turned parts of a momentum, as its state holds them."""
        keys = reversed(TURNED) if place.is_transposed else TURNED
        pairs = zip(keys, self._of_momentum, strict=True)
        return {key: place.matrix(part) for key, part in pairs if part is not None}

    def _all_views(self) -> Iterator[tuple[Tensor, list[tuple[str, Tensor | None]]]]:
        """What the state of each parameter holds between two iterations."""
        for member, own, turned in ((m, self._own[m.owner], self._turned[m.owner]) for m in self._members):
            views: dict[str, Tensor | None] = {"step": member.step, "momentum": member.momentum}
            if member.parameter is self.blocks[member.owner].weight:
                views |= {**dict.fromkeys(FACTORS), **own, **turned}
            yield member.parameter, [*views.items()]

    def gather(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]
    ) -> Sequence[Tensor]:
        """See :meth:`Stack.gather`."""
        self._receive(gradients, [member for member in self._members if self.is_present[member.owner]])
        own = [[states.get(parameter, {}) for parameter in block.parameters] for block in self.blocks]
        self.is_changed = [
            is_here and is_changed_together(each) for is_here, each in zip(self.is_present, own, strict=True)
        ]
        others = []
        for member, state in zip(self._members, itertools.chain(*own), strict=True):
            change = state.get("change", member.change)
            if change is not member.change:
                go_along(state, names[member.parameter], member.change)
                others.append((state, "change", member.change, change))
        adopt(others)
        products, self._norms = self._compare()
        return products, self._norms, torch.linalg.vector_norm(self.change, dim=(1, 2))

    def take_in(
        self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str], of: Groups
    ) -> None:
        """See :meth:`Stack.take_in`."""
        self._is_left = self._holds_views(states)
        loaded = [] if self._is_left else self._loaded(states)
        adopt(loaded)
        self._states = [states[block.weight] for block in self.blocks]
        for state in self._states:
            for key in TURNED:  # until the change is made: an iteration may be interrupted
                state.pop(key, None)
        follows = bool(loaded) or (self._is_left and self._versions == self._versions_now())
        if not self._is_left:
            self._adopt_momenta(gradients, states, names)
        here = [member for member in self._members if self.is_present[member.owner]]
        self._blend(gradients, here, self._advance(here, of))
        if self._is_left:
            self.is_ready = [*self.is_present]
        else:
            self.settle(states)
        self._follows, self._early = (all(self.is_ready) and follows,) * 2, [None, None]

    def _adopt_momenta(self, gradients: Mapping[Tensor, Tensor], states: States, names: Mapping[Tensor, str]) -> None:
        """Take up momenta and counts, also of what has no gradient: it may hold views that are to be overwritten."""
        others: list[tuple[State, str, Tensor, Any]] = []
        for member in self._members:
            parameter, is_here = member.parameter, self.is_present[member.owner]
            state = states[parameter] if is_here else states.get(parameter, {})
            momentum, step = state.get("momentum"), state.get("step")
            if momentum is not member.momentum and (is_here or momentum is not None):
                go_along(state, names[parameter], member.momentum)
                others.append(
                    (state, "momentum", member.momentum, gradients[parameter] if momentum is None else momentum)
                )
            if step is not member.step and (is_here or step is not None):
                others.append((state, "step", member.step, torch.zeros(()) if step is None else step))
        adopt(others)

    def _advance(self, here: Sequence[Member], of: Groups) -> list[float]:
        """Count the gradients; the weights of these in the momenta."""
        is_whole = len(here) == len(self._members)
        if is_whole:
            self._steps.add_(1.0)
        else:
            torch._foreach_add_([member.step for member in here], 1.0)
        counts = self._steps.tolist()
        decays = [of[member.parameter]["momentum"] for member in here]
        if is_whole and len({*counts}) == len({*decays}) == 1:
            weights = [newest(counts[0], decays[0])] * len(here)
        else:
            weights = [newest(counts[m.number], decay) for m, decay in zip(here, decays, strict=True)]
        self.counts = [int(counts[number]) for number in self._weights]
        self._newest = weights[0] if is_whole and len({*weights}) == 1 else None
        return weights

    def _blend(self, gradients: Mapping[Tensor, Tensor], here: Sequence[Member], weights: Sequence[float]) -> None:
        """Take gradients into the momenta."""
        average([member.momentum for member in here], [gradients[member.parameter] for member in here], weights)

    def settle(self, states: States) -> None:
        """See :meth:`Stack.settle`."""
        others, blank = [], list[Tensor]()
        for i, (block, views) in enumerate(zip(self.blocks, self._own, strict=True)):
            state = states.get(block.weight, {})
            if all(map(operator.is_, map(state.get, BASIS), map(views.get, BASIS))):
                self.is_ready[i] = self.is_present[i]
                continue
            self._follows = (False, False)
            fitting = [state[key].shape == views[key].shape for key in BASIS if key in state]
            fits = len(fitting) == len(BASIS) and all(fitting)
            self.is_ready[i] = fits and self.is_present[i]
            if fits:
                others += [(state, key, views[key], state[key]) for key in BASIS if state[key] is not views[key]]
            elif self.is_present[i]:
                blank += [views[key] for key in BASIS]
        adopt(others)
        for view in blank:  # last, as states may have been exchanged
            view.zero_()

    def observe(self) -> None:
        """See :meth:`Stack.observe`."""
        others: list[tuple[State, str, Tensor, Any]] = []
        for i, views in enumerate(self._own if not self._is_left else ()):
            state = self._states[i]
            for key in FACTORS:
                own, view = state.get(key), views.get(key)
                fits = own is not None and view is not None and own.shape == view.shape
                if view is None:
                    state.pop(key, None)
                elif own is not view and (fits or self.is_present[i]):
                    others.append((state, key, view, own if fits else torch.zeros_like(view)))
        adopt(others)
        if self.is_alike():
            self._take_into_factors(newest(self.counts[0], DECAY))
        else:
            super().observe()

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
        left, right = self._follows
        self._follows = (left and new.output is self.basis.output, right and new.input is self.basis.input)
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
            return Basis(follow(self.momentum, UA, UB, self._seen(0))._replace(rests=UA.rests), UB)
        if B is not None:
            return Basis(UA, tracked(B, UB.vectors))
        right = self._seen(1)
        return Basis(UA, follow(self.momentum.mT, UB, UA, None if right is None else right.mT))

    def _seen(self, side: int) -> Tensor | None:
        """The turned momentum, left (0) or right (1), these gradients taken in, if it follows from the last."""
        part = self._of_momentum[2 * side]
        if part is None or self._newest is None or not self._follows[side]:
            return None
        if self._early[side] is None:
            self._early[side] = new = self._beside(side)
            part.lerp_(new, self._newest)
        return part

    def means(self) -> Tensor:
        """See :meth:`Stack.means`."""
        return (self.moments * self._shares).sum((1, 2), keepdim=True)

    def room(self) -> Tensor:
        """See :meth:`Stack.room`."""
        return self.change if all(self.is_present) else torch.empty_like(self.change)

    def keep(self, changes: Tensor) -> None:
        """See :meth:`Stack.keep`."""
        for at in [] if changes is self.change else itertools.compress(self.slices, self.is_present):
            self.change[at].copy_(changes[at])

    def parts(self, i: int) -> dict[Tensor, Tensor]:
        """See :meth:`Stack.parts`."""
        return self._changes[i]

    def turned(self) -> tuple[Turned, Turned]:
        """See :meth:`Stack.turned`.

        Until their side of the basis changes, parts of momenta follow those of gradients, which spares their products.
        """
        if self._newest is not None and all(self._follows):
            gradient = self._turned_gradient()
            of_gradient, of_momentum = self._flat
            of_momentum.lerp_(of_gradient, self._newest)
            momentum = Turned(self.momentum, *self._of_momentum)
        else:
            known = self._seen(0), self._seen(1)
            gradient = self._turned_gradient()
            momentum = self.basis.turn(self.momentum, self._of_momentum, known)
        for state, own, is_ready in zip(self._states, self._turned, self.is_ready, strict=True):
            if is_ready:
                state.update(own)
        self._versions = self._versions_now()
        return gradient, momentum

    def _holds_views(self, states: States) -> bool:
        """Whether the states hold all views, as the last iteration left them."""
        for parameter, views in self._expected:
            get = states.get(parameter, {}).get
            for key, view in views:
                if get(key) is not view:
                    return False
        return True

    def _loaded(self, states: States) -> list[tuple[State, str, Tensor, Any]]:
        """Turned parts to take up where all was loaded, if they are those of the momenta beside them."""
        own = [states.get(block.weight, {}) for block in self.blocks]
        pairs = [(states.get(member.parameter, {}).get("momentum"), member.momentum) for member in self._members]
        parts: list[tuple[State, str, Tensor, Any]] = []
        for state, views, turned in zip(own, self._own, self._turned, strict=True):
            pairs += [(state.get(key), views[key]) for key in BASIS]
            parts += [(state, key, view, state.get(key)) for key, view in turned.items()]
        pairs += [(value, view) for *_, view, value in parts]
        if any(value is None or value is view or kind_of(value) != kind_of(view) for value, view in pairs):
            return []
        for block, state, turned in zip(self.blocks, own, self._turned, strict=True):
            M = block.matrix({p: states[p]["momentum"] for p in block.parameters})
            expected = dict(zip(TURNED, basis_of(state).turn(M)[1:], strict=False))
            # a state may be edited before it is loaded; what is less than this is gone with the next few gradients
            most = torch.finfo(M.dtype).eps ** 0.5 * M.norm()
            if any(bool((state[key] - expected[key]).norm() > most) for key in turned):
                return []
        return parts

    def _versions_now(self) -> list[object]:
        """What is counted up as momenta, their turned parts and eigenvectors are edited where they are.

        Memory of inference mode counts nothing, and is never as it was.
        """
        edited = self.momentum, self._flat[1], *(side.vectors for side in self.basis)
        return [object() if tensor.is_inference() else tensor._version for tensor in edited]
