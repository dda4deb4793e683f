"""The step of one matrix in the eigenbasis of its Kronecker factors, on the state that an optimiser keeps for it.

Shapes: gradient and momentum ``(groups, b, a)``, factors A ``(groups, a, a)`` and B ``(groups, b, b)``; what the state
holds beside them is explained in :mod:`ocnopt.differential.kronecker`, the rule in :mod:`ocnopt.optim.snopt`.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import (
    Basis,
    Eigen,
    Samples,
    carried_moments,
    eigenbasis,
    eigh,
    first_moments,
)

DECAY = 0.95  # beta, of second moments and of factors made of gradients
KEEP = 0.5  # share of the old factors in a refresh from samples
RANK = 128  # eigenvectors of A that are kept where it comes from samples, or is wider than WIDEST
WIDEST = 2048  # inputs up to which A is kept whole

State = MutableMapping[str, Any]


def newest(count: Any, decay: float) -> float:
    """The weight of the newest of ``count`` values in a running mean that weighs all of them alike at first.

    >>> [round(newest(count, decay=0.9), 3) for count in (1, 2, 1000)]
    [1.0, 0.526, 0.1]
    """
    return (1.0 - decay) / (1.0 - decay ** int(count))


def fits(state: Mapping[str, Any], gradient: Tensor) -> bool:
    """Whether there is an eigenbasis for a matrix, which changes as a bias is frozen or set free."""
    vectors = state.get("input_vectors")
    return vectors is not None and vectors.shape[-2] == gradient.shape[-1]


def observe(state: State, gradient: Tensor) -> None:
    """Take a gradient into the running means of G^T G and G G^T."""
    groups, rows, columns = gradient.shape
    if columns > WIDEST:
        return
    if "input_factor" not in state or state["input_factor"].shape[-1] != columns:
        state["input_factor"] = gradient.new_zeros(groups, columns, columns)
        state["output_factor"] = gradient.new_zeros(groups, rows, rows)
    weight = newest(state["step"], DECAY)
    state["input_factor"].baddbmm_(gradient.mT, gradient, beta=1.0 - weight, alpha=weight)
    state["output_factor"].baddbmm_(gradient, gradient.mT, beta=1.0 - weight, alpha=weight)


def refresh(state: State, gradient: Tensor, momentum: Tensor, samples: Samples | None) -> None:
    """A new eigenbasis, of samples or, if there are none, of the gradients; the second moments move into it."""
    old = _basis(state) if fits(state, gradient) else None
    if samples is None and gradient.shape[-1] <= WIDEST:
        new = Basis(_complete(state["input_factor"]), _complete(state["output_factor"]))
    else:
        new = eigenbasis(samples or Samples(momentum, momentum.mT), RANK, old, KEEP)
    state["moments"] = first_moments(new, gradient) if old is None else carried_moments(state["moments"], old, new)
    (state["input_vectors"], state["input_values"]), (state["output_vectors"], state["output_values"]) = new


class Pair(NamedTuple):
    """A matrix that is to move: its state with an eigenbasis, its gradient and momentum, and its damping."""

    state: State
    gradient: Tensor
    momentum: Tensor
    damping: float


def turn(pairs: Sequence[Pair], power: float) -> list[Tensor]:
    """The steps of some matrices, without lr."""
    if not pairs:
        return []
    bases = [_basis(pair.state) for pair in pairs]
    turned = [basis.turn(torch.stack(pair[1:3])) for basis, pair in zip(bases, pairs, strict=True)]
    moments = [pair.state["moments"] for pair in pairs]
    squares = [basis.squares(whole[0], part[0]) for basis, (whole, part) in zip(bases, turned, strict=True)]
    # what the moments began with counts as one observation
    average(moments, squares, [newest(pair.state["step"] + 1, DECAY) for pair in pairs])
    means = [basis.mean(moment) for basis, moment in zip(bases, moments, strict=True)]
    floors = torch._foreach_mul(means, [pair.damping for pair in pairs])
    tiny = torch.finfo(means[0].dtype).tiny
    torch._foreach_add_(floors, tiny)
    torch._foreach_add_(means, tiny)
    steps = [
        basis.precondition(whole[1], part[1], moment, floor, power)
        for basis, (whole, part), moment, floor in zip(bases, turned, moments, floors, strict=True)
    ]
    norms = torch._foreach_norm(steps)
    torch._foreach_add_(norms, tiny)
    torch._foreach_sqrt_(means)
    torch._foreach_mul_(norms, means)
    lengths = torch._foreach_norm([pair.momentum for pair in pairs])
    torch._foreach_mul_(steps, [*torch._foreach_div(lengths, norms)])
    return steps


def average(means: list[Tensor], values: list[Tensor], weights: Sequence[float]) -> None:
    """Take new values, each of its weight, into running means."""
    if len({*weights}) == 1:
        torch._foreach_lerp_(means, values, weights[0])
    else:
        for mean, value, weight in zip(means, values, weights, strict=True):
            mean.lerp_(value, weight)


def _basis(state: Mapping[str, Any]) -> Basis:
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )


def _complete(factor: Tensor) -> Eigen:
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(factor.dtype).tiny)
    values, vectors = eigh(factor / trace[:, None, None])
    return Eigen(vectors.flip(-1).contiguous(), values.flip(-1).clamp(min=0.0))
