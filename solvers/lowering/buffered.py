"""CasADi functions on arrays, read and written where they are, and the comparison of what they yield."""

from collections.abc import Sequence
from typing import Any

import casadi
import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Run:
    """A CasADi function on arrays: its own way in costs more than most functions."""

    def __init__(self, function: casadi.Function) -> None:
        symbols: Any = function.sx_in() if function.is_a("SXFunction") else function.mx_in()
        results: Any = function.call(symbols)
        dense = casadi.Function("dense", symbols, [casadi.densify(result) for result in results])
        self._results = [np.empty(int(dense.nnz_out(i))) for i in range(dense.n_out())]
        # CasADi's annotation of the buffer's methods misses what its documentation shows.
        buffer: Any
        buffer, self._evaluate = dense.buffer()
        self._read = buffer.set_arg
        for i, result in enumerate(self._results):
            buffer.set_res(i, result.data)

    def __call__(self, arguments: Sequence[Tensor]) -> list[NDArray[np.float64]]:
        """The results for columns of float64; the next call writes over them."""
        columns = [np.ascontiguousarray(argument.numpy()) for argument in arguments]
        for i, column in enumerate(columns):
            self._read(i, column.data)
        self._evaluate()
        return self._results


def same(new: NDArray[np.float64], old: NDArray[np.float64]) -> bool:
    """Equal up to rounding, relative to the largest entry."""
    size = np.abs(old).max(initial=0.0)
    if np.isfinite(size):
        return bool((np.abs(new - old) <= 1e-9 * (1 + size)).all())
    slack = 1e-9 * (1 + np.abs(np.nan_to_num(old, nan=0.0, posinf=0.0, neginf=0.0)).max())
    return np.allclose(new, old, rtol=1e-9, atol=slack, equal_nan=True)
