"""The steps of parameters, above all of matrices in the eigenbases of their Kronecker factors, on the state of each.

Shapes: gradient, momentum and step of a matrix ``(groups, b, a)``, factors A ``(groups, a, a)`` and B
``(groups, b, b)``. In A = U_A E_A U_A^T and B = U_B E_B U_B^T a gradient reads U_B^T G U_A, its second moments s (first
E_B E_A^T) are kept entry by entry, and the preconditioned gradient is U_B (U_B^T G U_A / (s + damping)^power) U_A^T.
Power 1 with s = E_B E_A^T is KFAC: vec(B^-1 G A^-1) = (A (X) B)^-1 vec(G). Bases of wide sides, and of samples fewer
than inputs, are leading parts (:mod:`ocnopt.optim.bases`). The rule as a whole is in :mod:`ocnopt.optim.snopt`.

Source: George et al., arXiv 1806.03884.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import Samples, working_dtype
from ocnopt.optim.bases import (
    KEEP,
    RANK,
    Basis,
    Eigen,
    Turned,
    carried_moments,
    complete,
    eigenbasis,
    first_moments,
    follow,
    is_wide,
    kept,
    of_rows,
)
from ocnopt.optim.blocks import Block, is_live
from ocnopt.optim.checks import check_same_shape
from ocnopt.optim.ranks import Shared

DECAY = 0.95  # beta, of second moments and of factors made of gradients
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero

_PARTS = ("momentum_left", "momentum_core", "momentum_right")
# of a state, what stays as it is when its parameter goes elsewhere
_OF_NO_DTYPE = ("step", "squares_step", "factor")

State = MutableMapping[str, Any]


def newest(count: Any, decay: float) -> float:
    """The weight of the newest of ``count`` values in a running mean that weighs all of them alike at first.

    >>> [round(newest(count, decay=0.9), 3) for count in (1, 2, 1000)]
    [1.0, 0.526, 0.1]
    """
    return (1.0 - decay) / (1.0 - decay ** int(count))


def average(means: list[Tensor], values: list[Tensor], weights: Sequence[float]) -> None:
    """Take new values, each of its weight, into running means."""
    if len({*weights}) == 1:
        torch._foreach_lerp_(means, values, weights[0])
    else:
        for mean, value, weight in zip(means, values, weights, strict=True):
            mean.lerp_(value, weight)


def take_in(
    groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], names: Mapping[Tensor, str]
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """The gradients, with weight decay, and their running means, in working precision."""
    gradients: dict[Tensor, Tensor] = {}
    momenta: dict[Tensor, Tensor] = {}
    for group in groups:
        parameters = [p for p in group["params"] if p.grad is not None and is_live(p)]
        if not parameters:
            continue
        found = [parameter.grad.to(working_dtype(parameter)) for parameter in parameters]
        if group["weight_decay"]:
            decayed = [parameter.to(gradient) for parameter, gradient in zip(parameters, found, strict=True)]
            found = [*torch._foreach_add(found, decayed, alpha=group["weight_decay"])]
        own = [states[parameter] for parameter in parameters]
        means = [_momentum(*each) for each in zip(own, map(names.__getitem__, parameters), found, strict=True)]
        steps = [state["step"] for state in own]
        torch._foreach_add_(steps, [torch.ones((), device="cpu")] * len(steps))  # numbers would become tensors, slowly
        counts = torch.stack(steps).tolist()
        average(means, found, [newest(count, group["momentum"]) for count in counts])
        gradients.update(zip(parameters, found, strict=True))
        momenta.update(zip(parameters, means, strict=True))
    return gradients, momenta


def _momentum(state: State, name: str, gradient: Tensor) -> Tensor:
    """The running mean of a parameter's gradients; its state follows where the parameter went (``model.to``)."""
    momentum = state.get("momentum")
    if momentum is None:
        momentum = state["momentum"] = gradient.clone()
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
    elif momentum.dtype != gradient.dtype or momentum.device != gradient.device:
        for key, value in state.items():
            state[key] = value if key in _OF_NO_DTYPE else value.to(gradient)
        momentum = state["momentum"]
    check_same_shape(name, "momentum", momentum.shape, gradient.shape)
    return momentum


def restore(groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], saved: Mapping[str, Any]) -> None:
    """States as they were saved: torch has cast them to the parameter's precision, theirs may be finer."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if "factor" in saved:  # of an earlier version, one for all
            states[parameter].setdefault("factor", saved["factor"])
        for key, value in saved["state"].get(index, {}).items():
            if key != "factor":
                place = value.device if key in _OF_NO_DTYPE else parameter.device
                states[parameter][key] = value.to(place, copy=True)


class Pair(NamedTuple):
    """A matrix that is to move: the state of its weight, gradient, momentum, options of its group, and slot."""

    state: State
    gradient: Tensor
    momentum: Tensor
    options: Mapping[str, Any]
    slot: "Slot | None" = None


class Slot:
    """Memory for gradient and momentum of a matrix one behind the other ``(2 groups, b, a)``, for products with both.

    It is written anew in each iteration. A matrix that is wide on both sides has none: it would be copied for nothing.
    """

    def __init__(self, block: Block, like: Tensor) -> None:
        groups, rows, columns = block.shape
        self.both = torch.empty(2 * groups, rows, columns, dtype=like.dtype, device=like.device)
        self.gradient, self.momentum = self.both[:groups], self.both[groups:]
        self.parts = [*block.parts(self.gradient).values(), *block.parts(self.momentum).values()]

    def fits(self, block: Block, like: Tensor) -> bool:
        """Whether it is of the matrix's present shape, precision and device."""
        return self.gradient.shape == block.shape and self.both.dtype == like.dtype and self.both.device == like.device


def side_by_side(
    blocks: Iterable[Block],
    gradients: Mapping[Tensor, Tensor],
    momenta: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, State],
    groups: Mapping[Tensor, Mapping[str, Any]],
    slots: MutableMapping[Tensor, Slot],
) -> list[tuple[Block, Pair]]:
    """The matrices all of whose parameters have gradients, each with its own in one place.

    ``slots``, by the weights, are kept from one iteration to the next.
    """
    pairs: list[tuple[Block, Pair]] = []
    places: list[Tensor] = []
    values: list[Tensor] = []
    for block in blocks:
        weight, parameters = block.weight, block.parameters
        if not all(parameter in gradients for parameter in parameters):
            continue
        gradient = gradients[weight]
        if is_wide(*block.shape[1:]):
            pair = Pair(states[weight], block.matrix(gradients), block.matrix(momenta), groups[weight])
        else:
            slot = slots.get(weight)
            if slot is None or not slot.fits(block, gradient):
                slot = slots[weight] = Slot(block, gradient)
            places += slot.parts
            values += [of[parameter] for of in (gradients, momenta) for parameter in parameters]
            pair = Pair(states[weight], slot.gradient, slot.momentum, groups[weight], slot)
        pairs.append((block, pair))
    if places:
        torch._foreach_copy_(places, values)
    return pairs


def first_order(state: State, gradient: Tensor, momentum: Tensor) -> Tensor:
    """The step of a parameter that is no such matrix, without lr: Adam's rule.

    A parameter may come to it late, with a momentum of other gradients: its squares count as one of them.
    """
    if "squares" not in state:
        state["squares"] = torch.maximum(gradient.square(), momentum.square())
        state["squares_step"] = torch.ones((), dtype=torch.float32)
    else:
        state["squares_step"] += 1
        state["squares"].lerp_(gradient.square(), newest(state["squares_step"], DECAY))
    return momentum / (state["squares"].sqrt() + EPSILON)


def misfits(states: Mapping[Tensor, State], blocks: Iterable[Block]) -> Iterator[State]:
    """The states of weights with eigenbases for other columns, but those that move by Adam's rule, anew, since then."""
    for block in blocks:
        state = states.get(block.weight, {})
        if "input_vectors" in state and "squares" not in state and not fits(state, block.shape):
            yield state


def begin_anew(states: Iterable[State]) -> None:
    """Let go of the momentum of parameters that are set free, or whose matrix has other columns now.

    It may be of gradients that were far larger, as a long step in a direction that it alone would show.
    """
    for state in states:
        for key in ("momentum", *_PARTS):
            state.pop(key, None)
        if "factor" in state:
            state["factor"] = min(1.0, state["factor"])


def forget_squares(states: Iterable[State]) -> None:
    """Let go of what :func:`first_order` knows of parameters that move as a matrix now."""
    for state in states:
        state.pop("squares", None)
        state.pop("squares_step", None)


def fits(state: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether there is an eigenbasis for matrices ``(groups, b, a)``, whose shape a bias changes that is set free."""
    if "input_vectors" not in state:
        return False
    groups, rows, columns = shape
    return (*state["output_vectors"].shape[:2], *state["input_vectors"].shape[:2]) == (groups, rows, groups, columns)


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


def is_received(gradient: Tensor | None) -> bool:
    """Whether there is a gradient other than the zeros of an empty batch."""
    # the norm of a large one takes a sixth of the time, but it may underflow
    return gradient is not None and (bool(gradient.norm()) or bool(gradient.any()))


def refresh(due: Mapping[int, tuple[Pair, Samples | None]], shared: Shared | None, *, mixed: bool) -> None:
    """Go over to new eigenbases, each made by the rank that it was shared out to.

    They are of the samples, where there are some, else of the gradients; ``mixed``: B of samples, A of gradients.
    """
    made: dict[int, Basis] = {}
    for i, (pair, samples) in due.items():
        if shared is None:
            _go_over(pair, _new_basis(pair, samples, mixed=mixed))
        elif shared.is_mine(i):
            with suppress(torch.linalg.LinAlgError):  # the others wait: all hear of it together
                made[i] = _new_basis(pair, samples, mixed=mixed)
    if shared is not None:
        for i, (UA, EA, UB, EB) in shared.spread(
            {i: [*new.input, *new.output] for i, new in made.items()}, due
        ).items():
            _go_over(due[i][0], Basis(Eigen(UA, EA), Eigen(UB, EB)))


def _new_basis(pair: Pair, samples: Samples | None, *, mixed: bool) -> Basis:
    state, gradient, momentum, *_ = pair
    old = _basis(state) if fits(state, gradient.shape) else None
    if samples is not None and not mixed:
        return eigenbasis(samples, RANK, old, KEEP)
    UA, UB = (None, None) if old is None else old
    # one side at a time, where the power method goes from each to the other
    alone = old if samples is None and is_wide(max(gradient.shape[1:])) else None
    if alone is not None and int(state.get("basis_step", 0)) % 2 == 0:
        return alone._replace(output=_of_gradients(state, "output_factor", momentum.mT, UB, UA))
    new = _of_gradients(state, "input_factor", momentum, UA, UB)
    if alone is not None:
        return alone._replace(input=new)
    if samples is not None:
        return Basis(new, of_rows(samples.gradients, kept(*gradient.shape[1:]), UB, KEEP))
    return Basis(new, _of_gradients(state, "output_factor", momentum.mT, UB, new))


def _of_gradients(state: State, factor: str, momentum: Tensor, own: Eigen | None, other: Eigen | None) -> Eigen:
    """The basis of one side: of the running mean of G^T G, or of the momentum alone where that side is wide."""
    if not is_wide(momentum.shape[-1]):
        return complete(state[factor])
    return follow(momentum, own, None if other is None else other.vectors)


def _go_over(pair: Pair, new: Basis) -> None:
    """Take a new eigenbasis; the second moments move into it."""
    state, gradient, *_ = pair
    old = _basis(state) if fits(state, gradient.shape) else None
    for part in _PARTS:
        state.pop(part, None)
    state["moments"] = first_moments(new, gradient) if old is None else carried_moments(state["moments"], old, new)
    (state["input_vectors"], state["input_values"]), (state["output_vectors"], state["output_values"]) = new
    if is_wide(max(gradient.shape[1:])):
        state["basis_step"] = state.get("basis_step", torch.zeros((), dtype=torch.float32)) + 1


def changes(
    pairs: Iterable[tuple[Block, Pair]], rates: Mapping[Tensor, float], power: float, length: str
) -> dict[Tensor, Tensor]:
    """What to add to the parameters of the matrices that have an eigenbasis: steps times -rate of each parameter."""
    ready = [(block, pair) for block, pair in pairs if fits(pair.state, pair.gradient.shape)]
    is_common = [len({rates[p] for p in block.parameters}) == 1 for block, _ in ready]  # no bias of another group
    common = [rates[block.weight] if is_one else 1.0 for (block, _), is_one in zip(ready, is_common, strict=True)]
    found: dict[Tensor, Tensor] = {}
    moved = _changes_together([pair for _, pair in ready], common, power, length)
    for (block, _), is_one, change in zip(ready, is_common, moved, strict=True):
        parts = block.parts(change)
        found.update(parts if is_one else {parameter: part * rates[parameter] for parameter, part in parts.items()})
    return found


def _changes_together(pairs: Sequence[Pair], rates: Sequence[float], power: float, length: str) -> list[Tensor]:
    """The changes of some matrices: steps as long as ``length`` says ("noise" or "division"), times -rate each."""
    if not pairs:
        return []
    if len({(pair.gradient.device, pair.gradient.dtype) for pair in pairs}) > 1:
        alone = zip(pairs, rates, strict=True)
        return [change for pair, rate in alone for change in _changes_together([pair], [rate], power, length)]
    bases = [_basis(pair.state) for pair in pairs]
    turned = [_turned(basis, pair) for basis, pair in zip(bases, pairs, strict=True)]
    moments = [pair.state["moments"] for pair in pairs]
    squares = [basis.squares(gradient) for basis, (gradient, _) in zip(bases, turned, strict=True)]
    # what the moments began with counts as one observation
    average(moments, squares, [newest(int(pair.state["step"]) + 1, DECAY) for pair in pairs])
    means = torch.stack([basis.mean(moment) for basis, moment in zip(bases, moments, strict=True)])
    tiny = torch.finfo(means.dtype).tiny
    floors = (means * means.new_tensor([pair.options["damping"] for pair in pairs])).add_(tiny)
    scales = [(moment + floor).pow_(-power) for moment, floor in zip(moments, floors.unbind(), strict=True)]
    factors = means.new_tensor(rates).neg_()
    # a wide step is measured, and made long, before it is made: each would read all of it
    if length == "noise":
        norms = [
            basis.norms(momentum, scale) for basis, (_, momentum), scale in zip(bases, turned, scales, strict=True)
        ]
        long, short = (torch.stack(each) for each in zip(*norms, strict=True))
        factors.mul_(long).div_((short + tiny).mul_((means + tiny).sqrt_()))
    torch._foreach_mul_(scales, factors.unbind())
    return [
        basis.scaled(momentum, scale, _memory(pair))
        for pair, basis, (_, momentum), scale in zip(pairs, bases, turned, scales, strict=True)
    ]


def _turned(basis: Basis, pair: Pair) -> tuple[Turned, Turned]:
    """Gradient and momentum, turned.

    Where both sides are wide, the parts of the momentum are kept, as they follow those of the gradient until the basis
    changes: each product that is spared reads the whole matrix.
    """
    if pair.slot is not None:
        return basis.turn_both(pair.slot.both)
    if not basis.is_thin:
        return basis.turn_both(torch.cat([pair.gradient, pair.momentum]))
    state, gradient = pair.state, basis.turn(pair.gradient)
    if all(part in state for part in _PARTS):
        parts = [state[part] for part in _PARTS]
        torch._foreach_lerp_(
            parts, [part for part in gradient[1:] if part is not None], newest(state["step"], pair.options["momentum"])
        )
        return gradient, Turned(pair.momentum, *parts)
    momentum = basis.turn(pair.momentum)
    state.update(zip(_PARTS, momentum[1:], strict=True))
    return gradient, momentum


def _memory(pair: Pair) -> Tensor | None:
    """That of the last change of a wide matrix, for the step: it costs more to allocate than to fill."""
    last, like = pair.state.get("change"), pair.momentum
    if last is None or pair.slot is not None:
        return None
    if (last.numel(), last.dtype, last.device) != (like.numel(), like.dtype, like.device):
        return None
    return pair.state.pop("change").view_as(like)


def move(changes: Mapping[Tensor, Tensor], states: Mapping[Tensor, State], trained: Iterable[Tensor]) -> None:
    """Move parameters, and remember the changes, of this iteration alone."""
    for parameter in trained:
        states.get(parameter, {}).pop("change", None)
    if changes:
        torch._foreach_add_([*changes], [*changes.values()])
    for parameter, change in changes.items():
        states[parameter]["change"] = change


def _basis(state: Mapping[str, Any]) -> Basis:
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )
