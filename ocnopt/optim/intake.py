"""What an iteration brings to the parameters: gradients, their running means, and both of a matrix side by side.

Shapes as in :mod:`ocnopt.optim.matrices`.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import working_dtype
from ocnopt.optim.bases import is_wide
from ocnopt.optim.checks import Block, check_same_shape, is_live

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
    """A matrix that is to move: its state with an eigenbasis, gradient, momentum, options of its group, and slot."""

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
