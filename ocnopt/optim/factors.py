"""The factors of lr: each matrix has one, and all parameters that are in none have one in common.

A factor rises where the last change went against the present gradient, and falls where it went along: with small
tensors the cosines would leap, so that the parts of a matrix count together.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.optim.checks import FACTORS, Block, gathered
from ocnopt.optim.intake import Pair

SHORTENED = 0.25  # a factor by a step that was taken back
LONGEST = 0.05  # of lr times a factor above 1: where gradients agree, the root mean square change of an entry

State = MutableMapping[str, Any]


def adapt(
    blocks: Iterable[Block],
    pairs: Mapping[Tensor, Pair],
    gradients: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, State],
    groups: Mapping[Tensor, Mapping[str, Any]],
    adaptation: float,
) -> None:
    """The factors of this iteration, in the states.

    Args:
        blocks: the matrices.
        pairs: those all of whose parameters have gradients, by the weights.
        gradients: of this iteration.
        states: the last changes are there.
        groups: the options of each parameter.
        adaptation: kappa.
    """
    loose = {**gradients}
    members: list[list[Tensor]] = []
    compared: list[list[tuple[Tensor, Tensor]]] = []
    for block in blocks:
        found = [p for p in block.parameters if loose.pop(p, None) is not None]
        members.append(found)
        compared.append(_compared(block, pairs.get(block.weight), found, gradients, states))
    members.append([*loose])
    compared.append([(gradients[p], states[p]["change"]) for p in loose if "change" in states[p]])
    for parameters, cosine in zip(members, cosines(compared), strict=True):
        if not parameters:
            continue
        last = next((states[p]["factor"] for p in parameters if "factor" in states[p]), 1.0)
        most = min(_most(groups[p]) for p in parameters)
        factor = min(most, max(FACTORS[0], last * math.exp(-adaptation * cosine)))
        for parameter in parameters:
            states[parameter]["factor"] = factor


def _compared(
    block: Block,
    pair: Pair | None,
    found: Sequence[Tensor],
    gradients: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, State],
) -> list[tuple[Tensor, Tensor]]:
    """The present gradient of a matrix beside its last change: as matrices, where all of it moved and is to move."""
    changes = {p: states[p]["change"] for p in found if "change" in states[p]}
    # a state that was loaded holds copies of the parts; sums over them, and over the matrix of them, round alike
    if pair is None or len(changes) < len(block.parameters):
        return [(gradients[p], change.contiguous()) for p, change in changes.items()]
    whole = changes[block.weight]._base if block.bias is not None else None
    is_whole = whole is not None and whole is changes[block.bias]._base and whole.shape == pair.gradient.shape
    return [(pair.gradient, whole if is_whole else block.matrix(changes))]


def _most(options: Mapping[str, Any]) -> float:
    """The largest factor: by the lr that a schedule began with, if that is more, so that it may lower lr."""
    lr = max(float(options["lr"]), float(options.get("initial_lr", 0.0)))
    return FACTORS[1] if lr * FACTORS[1] <= LONGEST else max(1.0, LONGEST / lr)


def shorten(states: Iterable[State]) -> None:
    """The factors of lr after a step that was taken back."""
    for state in states:
        state["factor"] = max(FACTORS[0], state.get("factor", 1.0) * SHORTENED)


def cosines(groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[float]:
    """Of the angle between gradients and changes, for each group of such pairs; 0 where one of them is zero.

    >>> along, across = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    >>> cosines([[(along, along), (across, -across)], [(along, across)]])
    [-0.28, 0.0]
    """
    pairs = [*itertools.chain(*groups)]
    if not pairs:
        return [0.0] * len(groups)
    gradients, changes = ([*one] for one in zip(*pairs, strict=True))
    products = [gradient.reshape(-1).dot(change.reshape(-1)) for gradient, change in pairs]
    numbers = gathered([*products, *torch._foreach_norm([*gradients, *changes])]).tolist()
    found, count, start = [], len(pairs), 0
    for group in groups:
        along, *sizes = (numbers[i : i + len(group)] for i in (start, start + count, start + 2 * count))
        size = math.prod(math.hypot(*norms) for norms in sizes)
        found.append(sum(along) / size if size > 0.0 else 0.0)
        start += len(group)
    return found
