"""Sweep and search of an iteration on compiled functions, for a fixed number of problems at a time.

Every array lies the same way in every iteration, time first, then the problems, dense: what a function is told of them
is prepared once, and an iteration fills the addresses in. What goes from call to call only stays here; what is returned
is new.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ocnopt.differential.sweep import Direction
from ocnopt.paths import Path
from ocnopt.solvers.kernels import Merit, Numbers
from ocnopt.solvers.lowered.arrays import Array
from ocnopt.solvers.lowered.compiled import Library
from ocnopt.solvers.lowered.steps import Steps


class Place(NamedTuple):
    """How far, in numbers, the next step and the next problem are, and how many problems there are."""

    step: int
    lane: int
    lanes: int


class Call:
    """A compiled function with its table of arrays."""

    def __init__(
        self, run: Callable[..., None], length: int, lanes: int, places: Sequence[Place], *, backwards: bool = False
    ) -> None:
        self._run, self._length, self._lanes = run, length, lanes
        rows = [(0, -step if backwards else step, lane, max(1, count)) for step, lane, count in places]
        self._table = np.array(rows, dtype=np.int64)
        self._first = np.array([8 * (length - 1) * step * backwards for step, _, _ in places])
        self._place = self._table.ctypes.data

    def __call__(self, addresses: Sequence[int], *more: int) -> None:
        """Run it on arrays that stand at these addresses, in the order of time."""
        self._table[:, 0] = addresses
        self._table[:, 0] += self._first
        self._run(self._length, self._lanes, self._place, *more)


class Iteration:
    """The two calls of an iteration.

    Args:
        steps: the lowered functions.
        length: N.
        lanes: problems.
        given: problems that have their own of what a step is given besides; 1 where it is the same for all.
        library: the compiled functions.
    """

    def __init__(self, steps: Steps, length: int, lanes: int, given: int, library: Library) -> None:
        sweep = steps.exact.function
        self.key = (lanes, given)
        self.length, n, m = length, int(sweep.nnz_in(4)), int(sweep.nnz_in(5))
        self.n, self.m, s = n, m, int(sweep.nnz_in(8))
        packed, ahead = int(sweep.nnz_in(0)), n + 1
        self._numbers, self._zero = torch.arange(length, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        # V, J, solvable at the end and at the start; what a search needs of each problem
        self._end, self.start = ([np.ones((lanes, size)) for size in (packed, ahead, 1)] for _ in range(2))
        self._own, self._shift = np.zeros((lanes, 6)), np.zeros((lanes, n))
        self._places = [part.ctypes.data for part in (*self._end, *self.start, self._own, self._shift)]

        def along(size: int) -> Place:
            return Place(lanes * size, size, lanes)

        def once(size: int) -> Place:
            return Place(0, size, lanes)

        number, own, last = Place(1, 1, 1), Place(given * s, s, given), Place(0, s, given)
        values = [once(packed), once(ahead)]
        self._ends = Call(library["end_value"], 1, lanes, [once(n), last, *values])
        self._sweeps, self._searches = {}, {}
        for open_, gap in ((True, along(n)), (False, Place(0, 0, 1))):
            places = [*values, once(1), number, along(n), along(m), gap, once(1), own]
            places += [*values, once(1), along(m), along(m * n), along(n)]
            for fold in (steps.exact, steps.gauss_newton):
                call = Call(library[fold.name], length, lanes, places, backwards=True)
                self._sweeps[fold is steps.exact, open_] = call
            places = [once(n), once(n), once(6), along(n), along(m), number, along(n), along(m), along(m), along(m * n)]
            places += [gap, own, last, once(1), once(1), along(n), along(m)]
            self._searches[open_] = Call(library["search"], length, lanes, places)

    def sweep(self, path: Path, mu: Array, d: Tensor, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """k, K and the costates; V, J and whether they mean anything, at the start, are left in ``start``."""
        lead, N, n, m = path.cost.shape, self.length, self.n, self.m
        z, u, gap = path.states.contiguous(), path.controls.contiguous(), self._gap(path)
        damping = torch.from_numpy(np.ascontiguousarray(mu))
        k, K, costates = _new(N, *lead, m), _new(N, *lead, m, n), _new(N + 1, *lead, n)
        at, end, start = z.data_ptr(), self._places[:3], self._places[3:6]
        own, after = d.data_ptr(), 8 * N * d[0].numel()
        self._ends([at + 8 * N * z[0].numel(), own + after, *end[:2]])
        costates.numpy()[-1] = self._end[1][:, 1:].reshape(*lead, n)
        given = [self._numbers.data_ptr(), at, u.data_ptr(), gap.data_ptr(), damping.data_ptr(), own]
        out = [*start, k.data_ptr(), K.data_ptr(), costates.data_ptr()]
        self._sweeps[exact, gap is not self._zero]([*end, *given, *out])
        return k, K, costates

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Numbers, d: Tensor, alphas: Array
    ) -> tuple[Path, Numbers]:
        """The longest step of each problem that gains enough, the path with its old gaps."""
        lead, N, n, m = path.cost.shape, self.length, self.n, self.m
        z, u, gap = path.states.contiguous(), path.controls.contiguous(), self._gap(path)
        k, K = direction.k.contiguous(), direction.K.contiguous()
        for i, values in enumerate((path.cost.numpy(), *merit, active)):
            self._own[:, i] = np.ravel(values)
        q = direction.dp.shape[-1]
        if q:
            self._shift[:, n - q :] = direction.dp.numpy().reshape(-1, q)
        step, cost, states, controls = np.empty(lead), _new(*lead), _new(N + 1, *lead, n), _new(N, *lead, m)
        at, own, (numbers, shift), after = z.data_ptr(), d.data_ptr(), self._places[6:], 8 * N * d[0].numel()
        before = [at, u.data_ptr()]
        given = [self._numbers.data_ptr(), *before, k.data_ptr(), K.data_ptr(), gap.data_ptr(), own, own + after]
        out = [step.ctypes.data, cost.data_ptr(), states.data_ptr(), controls.data_ptr()]
        call = self._searches[gap is not self._zero]
        call([at, shift, numbers, *before, *given, *out], len(alphas), alphas.ctypes.data)
        return Path(states, controls, cost, path.gaps, path.rows), step[()]

    def _gap(self, path: Path) -> Tensor:
        return self._zero if path.gaps is None else path.gaps.contiguous()


def _new(*shape: int) -> Tensor:
    """What is written to; torch.empty takes several times as long."""
    return torch.from_numpy(np.empty(shape))
