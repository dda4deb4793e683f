"""A torch tensor whose entries are CasADi expressions.

An :class:`Expression` of shape ``(s1, .., sk)`` holds its entries as one dense CasADi column in row-major order, SX
(scalars, for small functions) or MX (matrices, for wide networks). Nothing else is ever stored: a view is a gather of
entries by position, and the column-major reading of a row-major matrix is its transpose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import casadi
import torch
from torch import Tensor

# CasADi ships no annotations: a Column is casadi.SX or casadi.MX of shape (numel, 1).
Column = Any
Kind = Any
Rule = Callable[..., Any]

SHAPE_ONLY = (
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
    "_new_zeros_with_same_feature_meta",
)
"""Operators that read no entry of their arguments."""


class NotLowerableError(Exception):
    """An operator cannot be written in CasADi; the message says why and what to use instead."""


@dataclass(frozen=True, eq=False)
class Expression:
    """Entries in row-major order, with the shape that torch sees."""

    entries: Column
    shape: tuple[int, ...]

    @property
    def kind(self) -> Kind:
        """``casadi.SX`` or ``casadi.MX``."""
        return type(self.entries)


def symbol(kind: Kind, name: str, shape: Sequence[int]) -> Expression:
    """Return a tensor of free symbols."""
    return Expression(kind.sym(name, math.prod(shape)), tuple(shape))


def constant(kind: Kind, value: Tensor | float) -> Expression:
    """Return a tensor of numbers; booleans become 0 and 1."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    numbers = tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()
    return Expression(kind(casadi.DM(numbers)), tuple(tensor.shape))


def as_expression(kind: Kind, value: Any) -> Expression:
    """Read an operator's argument: an expression, a tensor of numbers or a number."""
    return value if isinstance(value, Expression) else constant(kind, value)


def gather(entries: Column, positions: Tensor) -> Column:
    """Pick entries by position, in the row-major order of ``positions``."""
    order = positions.reshape(-1)
    if order.shape[0] == entries.shape[0] and torch.equal(order, torch.arange(entries.shape[0])):
        return entries
    return entries[order.tolist(), 0] if order.shape[0] else type(entries)(0, 1)


def positions(shape: Sequence[int]) -> Tensor:
    """Number the entries of a tensor of this shape."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def broadcast(value: Expression, shape: Sequence[int]) -> Column:
    """Return the entries of ``value`` expanded to ``shape``."""
    return gather(value.entries, positions(value.shape).expand(tuple(shape)))


def operand(kind: Kind, value: Any, shape: tuple[int, ...]) -> Any:
    """An argument as a column, or as a number where all its entries agree: x**2 stays a square, whatever its shape."""
    if isinstance(value, Expression):
        return broadcast(value, shape)
    if isinstance(value, Tensor):
        first = value.reshape(-1)[:1]
        if value.numel() and bool((value == first).all()):
            return float(first)
        return broadcast(constant(kind, value), shape)
    return value


def matrix(value: Expression) -> Column:
    """Return the *transpose* of a matrix-shaped expression: CasADi reads columns where torch wrote rows."""
    rows, columns = value.shape
    return casadi.reshape(value.entries, columns, rows)


def from_matrix(transposed: Column) -> Expression:
    """Inverse of :func:`matrix`."""
    columns, rows = transposed.shape
    return Expression(casadi.densify(casadi.reshape(transposed, rows * columns, 1)), (rows, columns))


def lines(value: Expression, dims: Sequence[int]) -> Column:
    """Lay the entries that a reduction over ``dims`` puts together in the columns of a matrix (together, remaining)."""
    order = positions(value.shape)
    dims = [dim % order.ndim for dim in dims] if order.ndim else []
    together = math.prod(value.shape[dim] for dim in dims)
    kept = [dim for dim in range(order.ndim) if dim not in dims]
    # sizes in full: torch infers none beside an empty dimension
    apart = math.prod(value.shape[dim] for dim in kept)
    return casadi.reshape(gather(value.entries, order.permute([*kept, *dims])), together, apart)


class Site(NamedTuple):
    """Where a rule is applied: SX or MX, the result's shape and dtype, and the operator."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    operator: Callable[..., Any]


def operator_name(operator: Any) -> str:
    """``add`` for ``torch.ops.aten.add.Tensor`` and for Python's own ``operator.add``."""
    if isinstance(operator, torch._ops.OpOverload):
        return operator._schema.name.split("::")[-1]
    return getattr(operator, "__name__", str(operator))


def is_mutable(operator: Any) -> bool:
    """Whether the operator writes into an argument."""
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable
