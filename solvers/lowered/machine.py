"""What runs a fold over the horizon, and one that does: CasADi's virtual machine, problem after problem."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ocnopt.solvers.lowered.arrays import Array, Arrays
from ocnopt.solvers.lowered.steps import Fold


@runtime_checkable
class Runner(Protocol):
    """What runs a fold over the horizon, forwards or backwards."""

    def __call__(
        self, carried: Sequence[Array], given: Sequence[Array], into: Mapping[int, Array] | None = None
    ) -> tuple[list[Array], list[Array]]:
        """Run all problems.

        Args:
            carried: what the first step starts from, each ``(lanes, c)``.
            given: what each step is given, ``(length, lanes, d)``, or ``(lanes, d)``, the same for every step; fewer
                lanes stand for all, again and again.
            into: where to write kept results, by their number in the fold.

        Returns:
            What the last step carries on, each ``(lanes, c)``, and the kept results: yielded ones ``(length, lanes,
            e)``, carried ones ``(length + 1, lanes, c)`` with the start. Backwards, the last step is the first in time.
        """
        ...


class Machine:
    """A fold on CasADi's virtual machine, one problem after another: the whole horizon in one call.

    CasADi reads and writes the arrays themselves.
    """

    def __init__(self, fold: Fold, length: int) -> None:
        function, carried = fold.function, fold.carried
        self.fold, self.length = fold, length
        self.sizes = [int(function.nnz_out(i)) for i in range(function.n_out())]
        self.function = function if length == 1 else function.mapaccum(function.name(), length, carried)
        # CasADi's annotation of the buffer's methods misses what its documentation shows.
        buffer: Any
        buffer, self.evaluate = self.function.buffer()
        self.read, self.write = buffer.set_arg, buffer.set_res

    def __call__(self, carried: Sequence[Array], given: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Run all problems; arguments and results as in :class:`Runner`."""
        lanes = max([x.shape[0] for x in carried] + [x.shape[1] for x in given])
        if lanes == 1:
            return self._one(carried, given)
        own = [
            self._one([c[i : i + 1] for c in carried], [x[:, i % x.shape[1], None] for x in given])
            for i in range(lanes)
        ]
        last = [np.concatenate(rows) for rows in zip(*(one[0] for one in own), strict=True)]
        return last, [np.concatenate(rows, axis=1) for rows in zip(*(one[1] for one in own), strict=True)]

    def _one(self, carried: Sequence[Array], given: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Run one problem."""
        inputs = [np.ascontiguousarray(x) for x in (*carried, *given)]
        outputs = []
        for i, size in enumerate(self.sizes):
            ahead = 1 if i < len(carried) else 0
            output = np.empty((self.length + ahead, 1, size))
            if ahead:
                output[0] = carried[i]
            self.write(i, output[ahead:].data)
            outputs.append(output)
        for i, array in enumerate(inputs):
            self.read(i, array.data)
        self.evaluate()
        return [outputs[i][-1] for i in range(len(carried))], [outputs[i] for i in self.fold.kept]


class InTurn:
    """A runner that knows one direction of time and makes its own results, as a :class:`Runner`."""

    def __init__(self, runner: Machine | Arrays, *, backwards: bool) -> None:
        self.runner, self.order = runner, slice(None, None, -1 if backwards else 1)

    def __call__(
        self, carried: Sequence[Array], given: Sequence[Array], into: Mapping[int, Array] | None = None
    ) -> tuple[list[Array], list[Array]]:
        """Run all problems."""
        length = self.runner.length
        steps = [x if x.ndim == 3 else np.broadcast_to(x, (length, *x.shape)) for x in given]
        last, kept = self.runner(carried, [x[self.order] for x in steps])
        kept = [x[self.order] for x in kept]
        for place, number in enumerate(self.runner.fold.kept):
            if into and number in into:
                into[number][...] = kept[place]
        return last, kept
