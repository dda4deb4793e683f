"""Operators that move entries without computing: views, slices, joins, writes into a part.

The ATen operator itself, run on the *positions* of the entries, says which entry goes where, so one rule serves them
all. Only an index that depends on the function's arguments needs arithmetic: a lookup.
"""

from collections.abc import Sequence
from typing import Any

import casadi
import torch
from torch import Tensor

from ocnopt.solvers.lowering.expression import (
    SHAPE_ONLY,
    Expression,
    Kind,
    NotLowerableError,
    Rule,
    Site,
    as_expression,
    constant,
    gather,
    operator_name,
    positions,
)

_MOVEMENT = (
    "alias", "_unsafe_view", "as_strided", "cat", "clone", "constant_pad_nd", "contiguous", "detach",
    "diag_embed", "diagonal", "diagonal_scatter", "expand", "expand_copy", "flip", "lift_fresh_copy", "permute",
    "repeat", "reshape", "roll", "scatter", "select_copy", "select_scatter", "slice", "slice_scatter", "split",
    "split_copy", "split_with_sizes", "squeeze", "squeeze_copy", "stack", "t", "transpose", "tril", "triu",
    "unbind", "unfold", "unsqueeze", "unsqueeze_copy", "view", "view_copy",
)  # fmt: skip
# Where a number is moved in besides zero: the argument that holds it.
_FILL = {"constant_pad_nd": (2, "value"), "scatter": (3, "value")}


class _Pool:
    """The entries of all arguments of a data movement, numbered one after another; number 0 is a zero."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.columns = [kind(casadi.DM.zeros(1, 1))]
        self.size = 1

    def number(self, value: Any) -> Any:
        """Replace data by the positions of its entries; indices, masks and options stay as they are."""
        if isinstance(value, list | tuple):
            return [self.number(entry) for entry in value]
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            value = constant(self.kind, value)
        if not isinstance(value, Expression):
            return value
        numbers = positions(value.shape) + self.size
        self.columns.append(value.entries)
        self.size += numbers.numel()
        return numbers

    def pick(self, numbers: Any) -> Any:
        """Turn the numbers that came out into expressions."""
        if isinstance(numbers, list | tuple):
            return tuple(self.pick(entry) for entry in numbers)
        if len(self.columns) == 2 and bool((numbers > 0).all()):
            return Expression(gather(self.columns[1], numbers - 1), tuple(numbers.shape))
        return Expression(gather(casadi.vertcat(*self.columns), numbers), tuple(numbers.shape))


def move(site: Site, *arguments: Any, **options: Any) -> Any:
    """Run the operator on positions and gather what they say."""
    pool = _Pool(site.kind)
    values = list(arguments)
    place, key = _FILL.get(operator_name(site.operator), (len(values), ""))
    if place < len(values) and isinstance(values[place], int | float):
        values[place] = int(pool.number(constant(site.kind, float(values[place]))))
    if key in options:
        options[key] = int(pool.number(constant(site.kind, float(options[key]))))
    options.pop("memory_format", None)
    return pool.pick(site.operator(*(pool.number(value) for value in values), **options))


def _lookup(site: Site, table: Any, dim: int, index: Expression) -> Expression:
    """Rows of ``table`` chosen by an index that depends on the arguments: sum_i (index == i) row_i."""
    table = as_expression(site.kind, table)
    order = positions(table.shape).movedim(dim, 0)
    rows = [gather(table.entries, order[i]) for i in range(order.shape[0])]
    chosen = []
    entries: list[Any] = casadi.vertsplit(index.entries)
    for entry in entries:
        counted = casadi.if_else(entry < 0, entry + len(rows), entry)
        terms: list[Any] = [casadi.if_else(counted == i, row, 0) for i, row in enumerate(rows)]
        chosen.append(sum(terms[1:], terms[0]))
    ahead = len(index.shape)
    picked = positions((*index.shape, *order.shape[1:])).movedim(tuple(range(ahead)), tuple(range(dim, dim + ahead)))
    return Expression(casadi.densify(gather(casadi.vertcat(*chosen), picked)), tuple(picked.shape))


def _index(site: Site, x: Any, indices: Sequence[Any]) -> Any:
    moving = [i for i, index in enumerate(indices) if isinstance(index, Expression)]
    if not moving:
        return move(site, x, indices)
    if sum(index is not None for index in indices) > 1:
        raise NotLowerableError("an index that depends on the arguments must be the only one; use torch.where")
    return _lookup(site, x, moving[0], indices[moving[0]])


def _index_put(site: Site, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    if accumulate or any(isinstance(index, Expression) for index in indices):
        raise NotLowerableError("it adds to entries, or writes where the arguments say; use torch.where and sums")
    return move(site, x, indices, values)


def _gather(site: Site, x: Any, dim: int, index: Any, **options: Any) -> Any:
    if isinstance(index, Expression):
        raise NotLowerableError("its index depends on the arguments; use torch.where")
    return move(site, x, dim, index)


def _index_select(site: Site, x: Any, dim: int, index: Any) -> Any:
    if not isinstance(index, Expression):
        return move(site, x, dim, index)
    return _lookup(site, x, dim % len(x.shape), index)


def _shape_only(site: Site, x: Expression, *arguments: Any, **options: Any) -> Tensor:
    """Operators that read no entry (zeros_like, new_ones): numbers, from torch itself."""
    return site.operator(torch.zeros(x.shape, dtype=torch.float64), *arguments, **options)


RULES: dict[str, Rule] = (
    dict.fromkeys(_MOVEMENT, move)
    | dict.fromkeys(SHAPE_ONLY, _shape_only)
    | {
        "_new_zeros_with_same_feature_meta": lambda site, *unused, **options: torch.zeros(site.shape, dtype=site.dtype),
        "select": _index_select,
        "index": _index,
        "index_put": _index_put,
        "gather": _gather,
        "index_select": _index_select,
        "embedding": lambda site, table, index, *unused: _lookup(site, table, 0, index),
    }
)
