"""Folds as numpy calls over many problems at once, without a compiler.

A CasADi function of single numbers is a list of instructions on work registers. Each becomes one numpy call on rows of
many lanes, one lane a problem, that writes into its register; a chunk of lanes is carried over the whole horizon before
the next, so that its registers stay in the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import casadi
import numpy as np
import scipy.special
from numpy.typing import NDArray

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowered.steps import Fold

Array = NDArray[np.float64]

# Bytes that the registers of a chunk may fill, and limits of its width. The cost of a numpy call is the same for any
# width: 4096 lanes took .044 ms a problem where 1024 took .087 and 128 .38 (sweep of the pendulum, 32 MiB of cache).
_CACHE, _NARROW, _WIDE = 2**23, 128, 4096
# Widths are multiples of this, so that a shrinking batch seldom asks for a new one; so many are remembered.
_UNIT, _REMEMBERED = 64, 4


def _if_else_zero(condition: Array, value: Array, out: Array) -> None:
    """The value where the condition holds: a product would turn 0 times NaN into NaN."""
    out[...] = np.where(condition != 0.0, value, 0.0)


def _twice(x: Array, out: Array) -> None:
    np.add(x, x, out)


_CALLS: Mapping[int, Callable[..., Any]] = {
    casadi.OP_ASSIGN: np.positive,
    casadi.OP_ADD: np.add,
    casadi.OP_SUB: np.subtract,
    casadi.OP_MUL: np.multiply,
    casadi.OP_DIV: np.divide,
    casadi.OP_NEG: np.negative,
    casadi.OP_EXP: np.exp,
    casadi.OP_LOG: np.log,
    casadi.OP_POW: np.power,
    casadi.OP_CONSTPOW: np.power,
    casadi.OP_SQRT: np.sqrt,
    casadi.OP_SQ: np.square,
    casadi.OP_TWICE: _twice,
    casadi.OP_SIN: np.sin,
    casadi.OP_COS: np.cos,
    casadi.OP_TAN: np.tan,
    casadi.OP_ASIN: np.arcsin,
    casadi.OP_ACOS: np.arccos,
    casadi.OP_ATAN: np.arctan,
    casadi.OP_LT: np.less,
    casadi.OP_LE: np.less_equal,
    casadi.OP_EQ: np.equal,
    casadi.OP_NE: np.not_equal,
    casadi.OP_NOT: np.logical_not,
    casadi.OP_AND: np.logical_and,
    casadi.OP_OR: np.logical_or,
    casadi.OP_FLOOR: np.floor,
    casadi.OP_CEIL: np.ceil,
    casadi.OP_FMOD: np.fmod,
    casadi.OP_FABS: np.fabs,
    casadi.OP_SIGN: np.sign,
    casadi.OP_COPYSIGN: np.copysign,
    casadi.OP_IF_ELSE_ZERO: _if_else_zero,
    casadi.OP_ERF: scipy.special.erf,
    casadi.OP_FMIN: np.fmin,
    casadi.OP_FMAX: np.fmax,
    casadi.OP_INV: np.reciprocal,
    casadi.OP_SINH: np.sinh,
    casadi.OP_COSH: np.cosh,
    casadi.OP_TANH: np.tanh,
    casadi.OP_ASINH: np.arcsinh,
    casadi.OP_ACOSH: np.arccosh,
    casadi.OP_ATANH: np.arctanh,
    casadi.OP_ATAN2: np.arctan2,
    casadi.OP_ERFINV: scipy.special.erfinv,
    casadi.OP_HYPOT: np.hypot,
    casadi.OP_LOG1P: np.log1p,
    casadi.OP_EXPM1: np.expm1,
}


class _Tape:
    """The instructions of a function, bound to rows of a certain width."""

    def __init__(self, function: casadi.Function, width: int) -> None:
        self.inputs = [np.zeros((int(function.nnz_in(i)), width)) for i in range(function.n_in())]
        self.outputs = [np.zeros((int(function.nnz_out(i)), width)) for i in range(function.n_out())]
        work = np.zeros((int(function.sz_w()), width))
        # What a register holds: a row of the work array, an input's row where it stands, or a number.
        held: dict[int, Any] = {}
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        for i in range(function.n_instructions()):
            operation, read, write = (
                function.instruction_id(i),
                function.instruction_input(i),
                function.instruction_output(i),
            )
            if operation == casadi.OP_INPUT:
                held[write[0]] = self.inputs[read[0]][read[1]]
            elif operation == casadi.OP_CONST:
                held[write[0]] = np.array(function.instruction_constant(i))
            elif operation == casadi.OP_OUTPUT:
                self.calls.append((np.positive, (held[read[0]], self.outputs[write[0]][write[1]])))
            else:
                row = work[write[0]]
                self.calls.append((_CALLS[operation], (*(held[j] for j in read), row)))
                held[write[0]] = row

    def run(self) -> None:
        """From the input rows to the output rows."""
        for call, arguments in self.calls:
            call(*arguments)


class Arrays:
    """A fold over the horizon for many problems; arguments and results as in :class:`Machine`."""

    def __init__(self, fold: Fold, length: int) -> None:
        function = fold.function
        for i in range(function.n_instructions()):
            operation = function.instruction_id(i)
            if operation not in _CALLS and operation not in (casadi.OP_INPUT, casadi.OP_OUTPUT, casadi.OP_CONST):
                raise ProblemError(
                    f"kernel='lowered' has no numpy form of CasADi's operation {operation}; expected a problem without "
                    "it in a batch: use kernel='torch'"
                )
        self.fold, self.length = fold, length
        self.sizes = [int(function.nnz_out(i)) for i in range(function.n_out())]
        rows = int(function.sz_w()) + sum(self.sizes) + sum(int(function.nnz_in(i)) for i in range(function.n_in()))
        self.width = max(_NARROW, min(_WIDE, _CACHE // (8 * rows) // _UNIT * _UNIT))
        self.tapes: dict[int, _Tape] = {}

    def __call__(self, carried: Sequence[Array], given: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Run all problems, chunk by chunk."""
        lanes = max([x.shape[0] for x in carried] + [x.shape[1] for x in given])
        given = [x if x.shape[1] in (1, lanes) else np.tile(x, (1, lanes // x.shape[1], 1)) for x in given]
        last = [np.empty((lanes, size)) for size in self.sizes[: len(carried)]]
        kept = {i: np.empty((self.length + (i < len(carried)), lanes, self.sizes[i])) for i in self.fold.kept}
        chunks = -(-lanes // self.width)
        width = -(-lanes // chunks)
        tape = self._tape(-(-width // _UNIT) * _UNIT)
        with np.errstate(all="ignore"):
            for start in range(0, lanes, width):
                self._chunk(tape, slice(start, min(start + width, lanes)), carried, given, last, kept)
        return last, list(kept.values())

    def _chunk(
        self,
        tape: _Tape,
        lanes: slice,
        carried: Sequence[Array],
        given: Sequence[Array],
        last: Sequence[Array],
        kept: Mapping[int, Array],
    ) -> None:
        """Carry some lanes over the horizon."""
        count, ahead = lanes.stop - lanes.start, len(carried)
        state = list(zip(tape.inputs, tape.outputs, strict=False))[:ahead]
        for i, (start, (row, _)) in enumerate(zip(carried, state, strict=True)):
            row[:, :count] = start[lanes].T
            if i in kept:
                kept[i][0, lanes] = start[lanes]
        feeds = [
            (row[:, :count], x if x.shape[1] == 1 else x[:, lanes])
            for row, x in zip(tape.inputs[ahead:], given, strict=True)
        ]
        for t in range(self.length):
            for row, values in feeds:
                row[...] = values[t].T
            tape.run()
            for i, result in kept.items():
                result[t + (i < ahead), lanes] = tape.outputs[i][:, :count].T
            for before, after in state:
                before[...] = after
        for result, (_, after) in zip(last, state, strict=True):
            result[lanes] = after[:, :count].T

    def _tape(self, width: int) -> _Tape:
        """A tape of this width; the least recently made one is forgotten."""
        if width not in self.tapes:
            if len(self.tapes) == _REMEMBERED:
                del self.tapes[next(iter(self.tapes))]
            self.tapes[width] = _Tape(self.fold.function, width)
        return self.tapes[width]
