"""Gradients as an optimiser meets them: their sizes, and which of them are refused."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ocnopt.checks import listed
from ocnopt.errors import NonFiniteError, ProblemError

LARGE = 1e18  # of a norm, from which on squares may be infinite in single precision


def sizes(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each, in single precision at least; on a CPU that takes a tenth of the time of the largest entry.

    >>> sizes([torch.full((4,), 6e4, dtype=torch.float16)])
    tensor([120000.])
    """
    if not gradients:
        return torch.zeros(1)
    kinds = {*map(attrgetter("dtype"), gradients)}
    widest = functools.reduce(torch.promote_types, kinds, torch.float32)
    return gathered(torch._foreach_norm([*gradients], 2, None if kinds == {widest} else widest))


def gathered(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars as one tensor, also those of several devices or precisions."""
    several = len({*map(attrgetter("device", "dtype"), numbers)}) > 1
    return torch.stack([number.to(numbers[0]) for number in numbers] if several else [*numbers])


def not_finite(named: Iterable[tuple[str, Tensor]], norms: Tensor) -> list[str]:
    """The names of tensors that hold NaN or infinity; norms of finite ones may be too large a number."""
    if math.isfinite(norms.amax()):
        return []
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]


def check_dense(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The gradients of named parameters that have any; refuse sparse ones."""
    found = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None and parameter.numel()]
    sparse = [name for name, gradient in found if gradient.layout is not torch.strided]
    if sparse:
        raise ProblemError(
            f"the gradients of {listed(sparse)} are sparse; expected dense ones: build the layer with sparse=False"
        )
    return found


def check_gradients(named: Iterable[tuple[str, Tensor]], step: int | None = None) -> Tensor:
    """Refuse sparse gradients, and NaN or infinity; their sizes."""
    found = check_dense(named)
    norms = sizes([gradient for _, gradient in found])
    _check_finite(not_finite(found, norms), step)
    return norms


def check_norm(
    norm: float, named: Sequence[tuple[str, Tensor]], decayed: Mapping[Tensor, Tensor], step: int | None = None
) -> None:
    """Refuse gradients that are NaN or infinite, or whose squares are; those are refused with weight decay too.

    Args:
        norm: of all together, which tells when there is no need to look further.
        named: parameters and their names.
        decayed: the gradients of the parameters, with weight decay.
        step: the number of this step.
    """
    if norm <= LARGE:
        return
    found = check_dense(named)
    _check_finite([name for name, gradient in found if not bool(gradient.isfinite().all())], step)
    _check_squares(found)
    _check_squares([(f"{name} with weight decay", decayed[p]) for name, p in named if p in decayed])


def _check_squares(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse gradients whose squares, added up, are not finite in the precision of their second moments."""
    far = []
    for name, gradient in named:
        precision = torch.promote_types(gradient.dtype, torch.float32)
        if not float(gradient.double().norm()) <= torch.finfo(precision).max ** 0.5:
            far.append(name)
    if far:
        raise NonFiniteError(
            f"the squares of the gradients of {listed(far)} are infinite in the precision of second moments; expected "
            "gradients of a norm below 1e19 in single precision. Parameters and state are as before this step: scale "
            "the loss down, lower lr, or clip the gradients"
        )


def _check_finite(names: Sequence[str], step: int | None) -> None:
    if names:
        raise NonFiniteError(
            f"the gradients of {listed(names)} hold NaN or infinity{'' if step is None else f' at step {step}'}; "
            "expected finite numbers. Parameters and state are as before this step: catch this error to skip it; "
            "if it comes again, lower lr, or raise the damping if there is one"
        )
