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
FEW = 2**16  # entries that are copied in less time than their norms take one by one


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


def check_together(named: Iterable[tuple[str, Tensor]], step: int | None = None) -> float:
    """As :func:`check_gradients`, also refusing those whose squares are infinite; the norm of all together.

    That takes one call where there is little to be copied.
    """
    found = check_dense(named)
    gradients = [gradient for _, gradient in found]
    kinds = {(gradient.dtype, gradient.device.type) for gradient in gradients}
    if kinds == {(torch.float32, "cpu")} and sum(map(Tensor.numel, gradients)) <= FEW:
        norm = float(torch.linalg.vector_norm(torch.cat([gradient.reshape(-1) for gradient in gradients])))
    else:
        norm = math.hypot(*sizes(gradients).tolist())
    if not norm <= LARGE:
        _check_finite(not_finite(found, torch.tensor(norm)), step)
        _check_squares(found)
    return norm


def check_decayed(gradients: Mapping[Tensor, Tensor], names: Mapping[Tensor, str]) -> float:
    """Refuse gradients whose squares are infinite with weight decay; the norm of all together."""
    norm = math.hypot(*sizes([*gradients.values()]).tolist())
    if not norm <= LARGE:
        _check_squares([(f"{names[p]} with weight decay", gradient) for p, gradient in gradients.items()])
    return norm


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
