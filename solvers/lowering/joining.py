"""Operators that join entries: reductions and scans along dimensions, and linear algebra.

Along dimensions, the entries that belong together stand in the columns of a matrix (together, remaining).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import casadi
import torch

from ocnopt.solvers.lowering.entrywise import larger, smaller
from ocnopt.solvers.lowering.expression import (
    Column,
    Expression,
    NotLowerableError,
    Rule,
    Site,
    as_expression,
    broadcast,
    from_matrix,
    gather,
    lines,
    matrix,
    operand,
    operator_name,
    positions,
)


def _fold(step: Callable[[Column, Column], Column], nothing: float | None = None) -> Callable[[Column], Column]:
    """Join the rows of a matrix; ``nothing`` is what no rows give, where they give anything."""

    def fold(together: Column) -> Column:
        if together.shape[0] == 0 and nothing is not None:
            return type(together)(casadi.DM.ones(1, together.shape[1]) * nothing)
        return functools.reduce(step, casadi.vertsplit(together))

    return fold


def _mean(m: Column) -> Column:
    return casadi.sum1(m) / m.shape[0]


_REDUCTIONS: dict[str, Callable[[Column], Column]] = {
    "sum": casadi.sum1,
    "mean": _mean,
    "prod": _fold(lambda x, y: x * y, 1.0),
    "amax": _fold(larger),
    "amin": _fold(smaller),
    "max": _fold(larger),
    "min": _fold(smaller),
    "any": _fold(casadi.logic_or, 0.0),
    "all": _fold(casadi.logic_and, 1.0),
}


def _dims(x: Expression, dim: Any) -> list[int]:
    """The dimensions a reduction runs over: none named means all."""
    if dim is None or dim == []:
        return list(range(len(x.shape)))
    return [dim] if isinstance(dim, int) else list(dim)


def _column(site: Site, row: Column) -> Expression:
    return Expression(casadi.densify(row.T), site.shape)


def _reduce(site: Site, x: Expression, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    name = operator_name(site.operator)
    value = _column(site, _REDUCTIONS[name](lines(x, _dims(x, dim))))
    # max and min along a dimension return indices too; None there makes any use of them an error.
    return (value, None) if name in ("max", "min") and dim is not None else value


def _variance(site: Site, x: Expression, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Expression:
    m = lines(x, _dims(x, dim))
    centred = m - casadi.repmat(_mean(m), m.shape[0], 1)
    return _column(site, casadi.sum1(centred**2) / (m.shape[0] - (1 if correction is None else correction)))


def _norm(
    site: Site, x: Expression, order: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any
) -> Expression:
    m = lines(x, _dims(x, dim))
    if order == 2:
        return _column(site, casadi.sqrt(casadi.sum1(m**2)))
    if math.isinf(order):
        return _column(site, _REDUCTIONS["amax" if order > 0 else "amin"](casadi.fabs(m)))
    if order == 0:
        return _column(site, casadi.sum1(m != 0))
    return _column(site, casadi.sum1(casadi.fabs(m) ** order) ** (1 / order))


def _unlines(m: Column, shape: tuple[int, ...], dim: int) -> Expression:
    """Inverse of :func:`lines` along one dimension."""
    order = positions(shape).movedim(dim, -1).reshape(-1) if shape else positions((1,))
    flat = casadi.reshape(m, order.shape[0], 1)
    return Expression(casadi.densify(gather(flat, torch.argsort(order))), shape)


def _scan(step: Callable[[Column, Column], Column]) -> Callable[..., Expression]:
    def rule(site: Site, x: Expression, dim: int, **options: Any) -> Expression:
        rows = casadi.vertsplit(lines(x, [dim]))
        for i in range(1, len(rows)):
            rows[i] = step(rows[i - 1], rows[i])
        return _unlines(casadi.vertcat(*rows), x.shape, dim)

    return rule


def _softmax(site: Site, x: Expression, dim: int, *unused: Any, log: bool = False) -> Expression:
    m = lines(x, [dim])
    shifted = m - casadi.repmat(_REDUCTIONS["amax"](m), m.shape[0], 1)
    total = casadi.repmat(casadi.sum1(casadi.exp(shifted)), m.shape[0], 1)
    return _unlines(shifted - casadi.log(total) if log else casadi.exp(shifted) / total, x.shape, dim)


def _layer_norm(
    site: Site, x: Any, size: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Expression, None, None]:
    x = as_expression(site.kind, x)
    m = casadi.reshape(x.entries, math.prod(size), -1)
    centred = m - casadi.repmat(_mean(m), m.shape[0], 1)
    scale = casadi.sqrt(_mean(centred**2) + eps)
    column = casadi.reshape(centred / casadi.repmat(scale, m.shape[0], 1), -1, 1)
    column = column if weight is None else column * operand(site.kind, weight, x.shape)
    column = column if bias is None else column + operand(site.kind, bias, x.shape)
    return Expression(casadi.densify(column), x.shape), None, None


def _searchsorted(
    site: Site, edges: Any, x: Any, right: bool = False, side: str | None = None, **options: Any
) -> Expression:
    """Count the sorted edges below each entry."""
    if isinstance(edges, Expression) or edges.ndim != 1:
        raise NotLowerableError("its edges must be one vector of numbers")
    column = as_expression(site.kind, x).entries
    last = right or side == "right"
    below = [column >= edge if last else column > edge for edge in edges.tolist()]
    return Expression(casadi.densify(sum(below[1:], below[0])), site.shape)


def _mm(site: Site, a: Any, b: Any) -> Expression:
    transposed = matrix(as_expression(site.kind, b)) @ matrix(as_expression(site.kind, a))
    return from_matrix(transposed)


def _addmm(site: Site, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Expression:
    column = alpha * _mm(site, a, b).entries + beta * operand(site.kind, bias, site.shape)
    return Expression(column, site.shape)


def _items(x: Expression, core: int) -> list[Expression]:
    """The entries of a batch, each with the last ``core`` dimensions."""
    lead, tail = x.shape[: len(x.shape) - core], x.shape[len(x.shape) - core :]
    return [Expression(gather(x.entries, item), tail) for item in positions(x.shape).reshape(math.prod(lead), *tail)]


def _bmm(site: Site, a: Any, b: Any) -> Expression:
    pairs = zip(*(_items(as_expression(site.kind, value), 2) for value in (a, b)), strict=True)
    return Expression(casadi.vertcat(*(_mm(site, x, y).entries for x, y in pairs)), site.shape)


def _baddbmm(site: Site, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Expression:
    return Expression(alpha * _bmm(site, a, b).entries + beta * operand(site.kind, bias, site.shape), site.shape)


def _solve(
    site: Site, a: Any, b: Any, *, left: bool = True, check_errors: bool = False
) -> tuple[Expression, None, None, None]:
    a, b = as_expression(site.kind, a), as_expression(site.kind, b)
    vector = len(b.shape) == 1 or b.shape == a.shape[:-1]
    sides = (*site.shape, 1) if vector else site.shape
    lead = sides[:-2]
    a = Expression(broadcast(a, (*lead, *a.shape[-2:])), (*lead, *a.shape[-2:]))
    b = Expression(broadcast(Expression(b.entries, (*b.shape, 1)) if vector else b, sides), sides)
    solutions = []
    for x, y in zip(_items(a, 2), _items(b, 2), strict=True):
        # `matrix` gives transposes: A X = B with A = matrix(x).T; X A = B is A^T X^T = B^T.
        solution = casadi.solve(matrix(x).T, matrix(y).T).T if left else casadi.solve(matrix(x), matrix(y))
        solutions.append(from_matrix(solution).entries)
    return Expression(casadi.vertcat(*solutions), site.shape), None, None, None


def _inverse(site: Site, a: Expression, **options: Any) -> tuple[Expression, None]:
    inverses = [from_matrix(casadi.solve(matrix(x), site.kind(casadi.DM.eye(x.shape[0])))) for x in _items(a, 2)]
    return Expression(casadi.vertcat(*(inverse.entries for inverse in inverses)), site.shape), None


def _determinant(site: Site, a: Expression) -> tuple[Expression, None, None]:
    if a.shape[-1] > 6:
        raise NotLowerableError("the determinant of more than 6 rows has too many terms; write it from a factorisation")
    return Expression(casadi.vertcat(*(casadi.det(matrix(x)) for x in _items(a, 2))), site.shape), None, None


RULES: dict[str, Rule] = dict.fromkeys(_REDUCTIONS, _reduce) | {
    "var": _variance,
    "linalg_vector_norm": _norm,
    "cumsum": _scan(lambda x, y: x + y),
    "cumprod": _scan(lambda x, y: x * y),
    "_softmax": _softmax,
    "_log_softmax": functools.partial(_softmax, log=True),
    "native_layer_norm": _layer_norm,
    "searchsorted": _searchsorted,
    "bucketize": lambda site, x, edges, **options: _searchsorted(site, edges, x, **options),
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "_linalg_solve_ex": _solve,
    "linalg_inv_ex": _inverse,
    "_linalg_det": _determinant,
}
