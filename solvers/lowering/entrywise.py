"""Operators that work entry by entry: functions of CasADi columns, after broadcasting."""

import math
from collections.abc import Callable
from typing import Any

import casadi
import torch

from ocnopt.solvers.lowering.expression import (
    Column,
    Expression,
    NotLowerableError,
    Rule,
    Site,
    as_expression,
    operand,
    operator_name,
)
from ocnopt.solvers.lowering.movement import move


def _sigmoid(x: Column) -> Column:
    # By exp(-|x|): neither it nor its derivative overflows, and no digit is lost in the tails.
    small = casadi.exp(casadi.if_else(x >= 0, -x, x))
    return casadi.if_else(x >= 0, 1, small) / (1 + small)


def _where(condition: Column, x: Column, y: Column) -> Column:
    return casadi.if_else(condition, x, y)


def _truncate(x: Column) -> Column:
    return casadi.if_else(x >= 0, casadi.floor(x), casadi.ceil(x))


def _clamp(x: Column, lower: Column = None, upper: Column = None) -> Column:
    x = x if lower is None else larger(x, lower)
    return x if upper is None else smaller(x, upper)


def larger(x: Column, y: Column) -> Column:
    """The larger of two; unlike CasADi's, NaN where one is NaN, as in torch."""
    return _where(casadi.logic_and(_is_number(x), _is_number(y)), casadi.fmax(x, y), x + y)


def smaller(x: Column, y: Column) -> Column:
    """The smaller of two, or NaN."""
    return _where(casadi.logic_and(_is_number(x), _is_number(y)), casadi.fmin(x, y), x + y)


def _divide(x: Column, y: Column, rounding_mode: str | None = None) -> Column:
    quotient = x / y
    if rounding_mode is None:
        return quotient
    return casadi.floor(quotient) if rounding_mode == "floor" else _truncate(quotient)


def _gelu(x: Column, approximate: str = "none") -> Column:
    if approximate == "tanh":
        return 0.5 * x * (1 + casadi.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + casadi.erf(x / math.sqrt(2)))


def _elu(x: Column, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Column:
    return _where(x > 0, scale * x, scale * alpha * casadi.expm1(input_scale * x))


def _is_number(x: Column) -> Column:
    # CasADi simplifies x == x to true; only a NaN is not at most infinity
    return x <= math.inf


def _equal(x: Column, y: Column) -> Column:
    same = isinstance(x, type(y)) and not isinstance(x, int | float) and casadi.is_equal(x, y, 2)
    return _is_number(x) if same else x == y


ENTRYWISE: dict[str, Callable[..., Column]] = {
    "add": lambda x, y, alpha=1: x + (y if alpha == 1 else alpha * y),
    "sub": lambda x, y, alpha=1: x - (y if alpha == 1 else alpha * y),
    "rsub": lambda x, y, alpha=1: y - (x if alpha == 1 else alpha * x),
    "mul": lambda x, y: x * y,
    "div": _divide,
    "floor_divide": lambda x, y: casadi.floor(x / y),
    "remainder": lambda x, y: x - y * casadi.floor(x / y),
    "fmod": casadi.fmod,
    "pow": lambda x, y: x**y,
    "atan2": casadi.atan2,
    "hypot": lambda x, y: casadi.sqrt(x * x + y * y),
    "maximum": larger,
    "minimum": smaller,
    "fmax": casadi.fmax,
    "fmin": casadi.fmin,
    "copysign": lambda x, y: casadi.fabs(x) * _where(y < 0, -1, 1),
    "neg": lambda x: -x,
    "abs": casadi.fabs,
    "sign": casadi.sign,
    "sgn": casadi.sign,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "sqrt": casadi.sqrt,
    "rsqrt": lambda x: 1 / casadi.sqrt(x),
    "exp": casadi.exp,
    "exp2": lambda x: casadi.exp(math.log(2) * x),
    "expm1": casadi.expm1,
    "log": casadi.log,
    "log1p": casadi.log1p,
    "log2": lambda x: casadi.log(x) / math.log(2),
    "log10": casadi.log10,
    "erf": casadi.erf,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: _where(x > 0, x, _where(_is_number(x), 0, x)),
    "leaky_relu": lambda x, slope=0.01: _where(x > 0, x, slope * x),
    "elu": _elu,
    "gelu": _gelu,
    "hardtanh": lambda x, lower=-1, upper=1: _clamp(x, lower, upper),
    "floor": casadi.floor,
    "ceil": casadi.ceil,
    "trunc": _truncate,
    "frac": lambda x: x - _truncate(x),
    "clamp": _clamp,
    "where": _where,
    "addcmul": lambda x, y, z, value=1: x + value * y * z,
    "addcdiv": lambda x, y, z, value=1: x + value * y / z,
    "lerp": lambda x, y, weight: x + weight * (y - x),
    "eq": _equal,
    "ne": lambda x, y: casadi.logic_not(_equal(x, y)),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "logical_and": casadi.logic_and,
    "logical_or": casadi.logic_or,
    "logical_xor": lambda x, y: (x != 0) != (y != 0),
    "logical_not": casadi.logic_not,
    "isnan": lambda x: casadi.logic_not(_is_number(x)),
    "isinf": lambda x: casadi.fabs(x) == math.inf,
    "copy": lambda old, new: new,
} | {name: getattr(casadi, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan")} | {
    name: getattr(casadi, name) for name in ("sinh", "cosh", "tanh", "asinh", "acosh", "atanh")
}  # fmt: skip


def _entrywise(site: Site, *arguments: Any, **options: Any) -> Expression:
    name = operator_name(site.operator)
    column = ENTRYWISE[name](
        *(operand(site.kind, value, site.shape) for value in arguments),
        **{key: operand(site.kind, value, site.shape) for key, value in options.items()},
    )
    return Expression(casadi.densify(column), site.shape)


def _boolean(name: str) -> Callable[..., Expression]:
    def rule(site: Site, *arguments: Any) -> Expression:
        if site.dtype != torch.bool:
            raise NotLowerableError("it works on the bits of integers; use logical operators and arithmetic")
        operands = [operand(site.kind, value, site.shape) for value in arguments]
        return Expression(casadi.densify(ENTRYWISE[name](*operands)), site.shape)

    return rule


def _convert(site: Site, x: Expression, **options: Any) -> Expression:
    if site.dtype == torch.bool:
        return Expression(x.entries != 0, site.shape)
    return x if site.dtype.is_floating_point else Expression(_truncate(x.entries), site.shape)


def _choose(site: Site, condition: Any, x: Any, y: Any) -> Expression:
    """where: a condition made of numbers only moves entries, and leaves no trace of the branch not taken."""
    if isinstance(condition, Expression):
        return _entrywise(site, condition, x, y)
    return move(site, condition, as_expression(site.kind, x), as_expression(site.kind, y))


RULES: dict[str, Rule] = dict.fromkeys(ENTRYWISE, _entrywise) | {
    "where": _choose,
    "bitwise_and": _boolean("logical_and"),
    "bitwise_or": _boolean("logical_or"),
    "bitwise_xor": _boolean("logical_xor"),
    "bitwise_not": _boolean("logical_not"),
    "_to_copy": _convert,
    "_local_scalar_dense": lambda site, x: x,
}
