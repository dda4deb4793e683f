"""The three things that DDP asks of a problem, on lowered functions.

A kernel evaluates a path with its gaps, sweeps backwards along it for a direction, and rolls the feedback law out. Here
the torch functions of the one step are lowered to CasADi once; everything else is made from them symbolically and runs
as a fold over time: compiled where there is a compiler and work enough for it (see ``compiled``), else on CasADi's
virtual machine for a few problems, as numpy calls over many (see ``arrays``).

Shapes: time first, then the batch: states ``(N + 1, *lead, n)``, controls ``(N, *lead, m)``, gains ``(N, *lead, m,
n)``. The state z = (x, p) holds the static controls. Numbers are float64 on the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.bounds import picked
from ocnopt.differential.sweep import CostToGo, Direction, minimise_start
from ocnopt.paths import Path
from ocnopt.solvers.kernels import Merit, Numbers
from ocnopt.solvers.lowered.arrays import Array, Arrays
from ocnopt.solvers.lowered.compiled import Compiled, Library, build, find
from ocnopt.solvers.lowered.iteration import Iteration
from ocnopt.solvers.lowered.limits import fits, refused
from ocnopt.solvers.lowered.problem import control_limits, given_rows, lower_step
from ocnopt.solvers.lowered.source import Line
from ocnopt.solvers.lowered.steps import Fold, Steps, make_steps
from ocnopt.solvers.solution import Guess
from ocnopt.staged import StagedOCP

# So many problems are run one by one: beyond, numpy's calls cost less.
_FEW = 96
# So many step sizes times problems are rolled out together.
_TOGETHER = 1024
# How many problems are worked on at a time, without and with a compiler.
_WINDOWS = (4096, 512)
# What compiling is weighed against: this many sweeps, with seconds for an instruction of a problem on the virtual
# machine and as a numpy call, and for one in the compiler.
_SWEEPS, _ON_MACHINE, _AS_ARRAYS, _COMPILED = 15, 8e-9, 1.5e-9, 2.5e-4


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


class LoweredKernel:
    """A problem's lowered functions and what runs them.

    Example:
        >>> from ocnopt.staged import Stage
        >>> stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
        >>> problem = StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=1)
        >>> kernel = LoweredKernel(problem, Guess([torch.zeros(1, dtype=torch.float64)], problem.start_parameters()))
        >>> path = kernel.evaluate(torch.ones(2, 1).double(), torch.zeros(1, 1).double())
        >>> kernel.direction(path, torch.zeros(()).double(), exact=True).k  # half of the way to zero
        tensor([[-0.5000]], dtype=torch.float64)
    """

    apart = True

    def __init__(self, problem: StagedOCP, guess: Guess, *, compile: bool | Literal["auto"] = "auto") -> None:  # noqa: A002
        """Lower a problem as ``transcribe`` returns it, or one with one Stage.

        Args:
            problem: its static controls are still parameters, not part of the state.
            guess: where the lowered functions are compared with torch.
            compile: whether to compile, where there is a compiler; "auto": if that was done before, or for a batch that
                will take longer without.

        Raises:
            ProblemError: the problem is not for this kernel; the message says why.
        """
        reason = fits(problem)
        if reason is not None:
            raise refused(reason)
        self._lowered = lower_step(problem, guess.controls[0], guess.parameters)
        box, self._bounds = control_limits(problem)
        self._d = given_rows(problem, self._bounds)
        self.q, self.m = problem.parameter_dim, problem.groups[0].stage.control_dim
        self.n, self.length = problem.state_dim + self.q, problem.steps
        self.parameter_bounds = problem.parameter_bounds
        self._steps: Steps = make_steps(self._lowered.step, self._lowered.end, self.n, self.m, self.q, box)
        self._numbers = np.arange(self.length, dtype=float)[:, None, None]
        self._no_gaps = np.zeros((self.length, 1, self.n))
        self._runners: dict[tuple[bool, str], Runner] = {}
        lanes = problem.initial_state.shape[:-1].numel()
        self._library = self._compiled(lanes, compile)
        self._iteration: Iteration | None = None
        used = (self._steps.exact, self._steps.gauss_newton, self._steps.walk, self._steps.end, self._steps.end_value)
        for fold in used:
            self._runner(fold, lanes)

    @property
    def name(self) -> str:
        """What runs the lowered functions."""
        return "lowered" if self._library is None else "compiled"

    @property
    def window(self) -> int:
        """How many problems are best worked on at a time: without a compiler what a numpy call costs counts most."""
        return _WINDOWS[self._library is not None]

    def refresh(self, problem: StagedOCP) -> None:
        """Read the problem's data and ``step_data`` again, which may have changed since.

        Raises:
            ProblemError: something else has changed that its functions capture.
        """
        self._lowered.require_same(problem)
        self._d = given_rows(problem, self._bounds)

    def evaluate(self, states: Tensor, controls: Tensor, rows: Tensor | None = None) -> Path:
        """The gaps and the cost of a given path, ``(N + 1, *lead, n)`` and ``(N, *lead, m)``."""
        lead = controls.shape[1:-1]
        z, u, d = _rows(states), _rows(controls), self._given(rows).numpy()
        given = [self._numbers, z[:-1], u, z[1:], d[:-1]]
        (cost,), (gaps,) = self._run(self._steps.gaps, [np.zeros((z.shape[1], 1))], given)
        total = _tensor(self._total(cost, z, d), lead)
        return Path(states, controls, total, _tensor(gaps, (self.length, *lead, self.n)), rows)

    def direction(self, path: Path, mu: Numbers, *, exact: bool) -> Direction:
        """Sweep backwards along a path, then minimise over the static controls.

        Args:
            path: ``lead`` is the batch.
            mu: the regularisation of each problem, ``(*batch)``.
            exact: keep the second derivatives of the dynamics.
        """
        mu = np.asarray(mu, dtype=float)
        if self._library is None:
            start, (k, K, costates) = self._sweep(path, mu, exact=exact)
        else:
            iteration, d = self._prepared(path, self._library)
            k, K, costates = iteration.sweep(path, mu, d, exact=exact)
            start = iteration.start
        return Direction(k, K, costates, *self._minimise_start(path, start, mu))

    def _sweep(self, path: Path, mu: Array, *, exact: bool) -> tuple[list[Array], list[Tensor]]:
        """V, J and whether they mean anything, at the start; k, K and the costates."""
        lead, N, n = path.cost.shape, self.length, self.n
        z, u, d = _rows(path.states), _rows(path.controls), self._given(path.rows).numpy()
        _, (V, J) = self._run(self._steps.end_value, [], [z[-1:], d[-1:]])
        gaps = self._no_gaps if path.gaps is None else _rows(path.gaps)
        given = [self._numbers, z[:-1], u, gaps, mu.reshape(-1, 1), d[:-1]]
        fold = self._steps.exact if exact else self._steps.gauss_newton
        costates = np.empty(z.shape)
        costates[-1] = J[0, :, 1:]
        into = {fold.kept[-1]: costates[:-1]}
        start, (k, K, _) = self._run(fold, [V[0], J[0], np.ones((z.shape[1], 1))], given, into)
        shapes = (N, *lead, self.m), (N, *lead, self.m, n), (N + 1, *lead, n)
        return start, [_tensor(part, shape) for part, shape in zip((k, K, costates), shapes, strict=True)]

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """Roll the feedback law out with each step size.

        Args:
            path: ``lead`` is the batch.
            direction: of this path.
            alphas: ``(A,)``.

        Returns:
            The paths, ``lead`` = (A, *batch).
        """
        together = max(1, _TOGETHER // max(1, path.cost.numel()))
        some = [alphas] if len(alphas) <= together else alphas.split(together)
        columns = zip(*(self._roll_out(path, direction, part) for part in some), strict=True)
        states, controls, cost = (_joined(parts, axis) for parts, axis in zip(columns, (1, 1, 0), strict=True))
        if path.gaps is None:
            return Path(states, controls, cost)
        left = (1 - alphas).reshape(-1, *(1,) * (path.gaps.ndim - 1)) * path.gaps[:, None]
        return Path(states, controls, cost, left)

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Numbers, alphas: Sequence[float]
    ) -> tuple[Path, Numbers] | None:
        """The longest step of each problem that gains enough, where there is a compiled kernel.

        Args:
            path: ``lead`` is the batch.
            direction: of this path.
            merit: what a step must gain.
            active: whether to search, ``(*batch)``.
            alphas: step sizes, the longest first.

        Returns:
            The path, that given where no step gains enough, with its old gaps; and the step taken, zero for none.
        """
        if self._library is None:
            return None
        iteration, d = self._prepared(path, self._library)
        return iteration.search(path, direction, merit, active, d, np.array(alphas))

    def _prepared(self, path: Path, library: Library) -> tuple[Iteration, Tensor]:
        """What an iteration of so many problems needs, and what their steps are given."""
        d = self._given(path.rows)
        key = path.cost.numel(), d.shape[1]
        if self._iteration is None or self._iteration.key != key:
            self._iteration = Iteration(self._steps, self.length, *key, library)
        return self._iteration, d

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """Step sizes one by one for a few problems; over many a call costs the same for three."""
        return [(alpha,) for alpha in alphas] if lanes <= _FEW else (alphas[:1], alphas[1:4], alphas[4:])

    def _roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States, controls and costs for some step sizes at once."""
        count, lead, N = len(alphas), (len(alphas), *path.cost.shape), self.length
        zbar, alpha, d = _rows(path.states), alphas.numpy(), self._given(path.rows).numpy()
        z0 = np.tile(zbar[0], (count, 1))
        if self.q > 0:
            z0[:, self.n - self.q :] += (alpha[:, None, None] * _rows(direction.dp[None])).reshape(len(z0), self.q)
        given = [*self._law(path, direction), alpha.repeat(zbar.shape[1])[:, None], d[:-1]]
        (_, cost), (z, u) = self._run(self._steps.walk, [z0, np.zeros((len(z0), 1))], given)
        states, controls = _tensor(z, (N + 1, *lead, self.n)), _tensor(u, (N, *lead, self.m))
        return states, controls, _tensor(self._total(cost, z, d), lead)

    def _law(self, path: Path, direction: Direction) -> list[Array]:
        """What the rollout is given before the step size."""
        zbar = _rows(path.states)
        K = direction.K.numpy().reshape(self.length, zbar.shape[1], self.m * self.n)
        gaps = self._no_gaps if path.gaps is None else _rows(path.gaps)
        return [self._numbers, zbar[:-1], _rows(path.controls), _rows(direction.k), K, gaps]

    def _total(self, cost: Array, z: Array, d: Array) -> Array:
        """The cost along the path and at its end."""
        _, (phi,) = self._run(self._steps.end, [], [z[-1:], d[-1:]])
        return cost + phi[0]

    def _given(self, rows: Tensor | None) -> Tensor:
        """What each step of some problems is given besides, ``(N + 1, lanes, s)``."""
        return self._d[:, rows].contiguous() if rows is not None and self._d.shape[1] > 1 else self._d

    def _minimise_start(self, path: Path, start: Sequence[Array], mu: Array) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step of the static controls, and the predicted change of cost with its flag."""
        lead, q, (V, J, solvable) = path.cost.shape, self.q, start
        fine = torch.from_numpy(((solvable[:, 0] > 0) & np.isfinite(J[:, 0])).reshape(lead))
        if q == 0:
            linear = J[:, 0].copy()
            quadratic = 0.5 * V[:, 0] - linear
            dp = path.states.new_empty((*lead, 0))
            return dp, torch.from_numpy(linear.reshape(lead)), torch.from_numpy(quadratic.reshape(lead)), fine
        p, i = path.states[0][..., self.n - q :], np.arange(self.n + 1)
        low, high = np.minimum(i, i[:, None]), np.maximum(i, i[:, None])
        whole = _tensor(V[:, high * (high + 1) // 2 + low], (*lead, self.n + 1, self.n + 1))
        bounds = self.parameter_bounds if path.rows is None else picked(self.parameter_bounds, path.rows, 0)
        room = None if bounds is None else (bounds[0] - p, bounds[1] - p)
        damping = torch.from_numpy(mu)[..., None, None] * torch.eye(q, dtype=p.dtype)
        dp, value = minimise_start(CostToGo(whole, _tensor(J, (*lead, self.n + 1)), fine), q, damping, room)
        return dp, value.linear, value.quadratic, value.solvable & torch.isfinite(value.linear)

    def _run(
        self,
        fold: Fold,
        carried: Sequence[Array],
        given: Sequence[Array],
        into: Mapping[int, Array] | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """A fold over the horizon, or one step where nothing is carried."""
        lanes = max(x.shape[-2] for x in (*carried, *given))
        return self._runner(fold, lanes)(carried, given, into)

    def _runner(self, fold: Fold, lanes: int) -> Runner:
        """What runs a fold for that many problems."""
        few = lanes <= _FEW or self._library is not None
        key = (few, fold.name)
        if key not in self._runners:
            length, backwards = (
                self.length if fold.carried else 1,
                fold in (self._steps.exact, self._steps.gauss_newton),
            )
            if self._library is not None:
                self._runners[key] = Compiled(fold, length, self._library, backwards=backwards)
            else:
                self._runners[key] = InTurn((Machine if few else Arrays)(fold, length), backwards=backwards)
        return self._runners[key]

    def _compiled(self, lanes: int, choice: bool | Literal["auto"]) -> Library | None:
        """The compiled functions, if they are wanted and can be had."""
        if choice is False:
            return None
        folds, search = tuple(self._steps), Line(self._steps.walk, self._steps.end, alpha=8)
        found = find(folds, search) if choice == "auto" else None
        sweep = self._steps.exact.function.n_instructions() + self._steps.walk.function.n_instructions()
        work = _SWEEPS * self.length * lanes * sweep * (_ON_MACHINE if lanes <= _FEW else _AS_ARRAYS)
        worth = work > _COMPILED * sum(fold.function.n_instructions() for fold in folds)
        return build(folds, search) if found is None and (choice is True or worth) else found


def _rows(values: Tensor) -> Array:
    """``(time, *lead, d)`` as ``(time, lanes, d)``."""
    array: Array = values.numpy()
    return array.reshape(array.shape[0], math.prod(array.shape[1:-1]), array.shape[-1])


def _tensor(values: NDArray[Any], shape: Sequence[int]) -> Tensor:
    """An array as a tensor of another shape; torch takes no negative strides, not even of an axis of size one."""
    values = values.copy() if min(values.strides) < 0 else values
    return torch.from_numpy(values.reshape(tuple(shape)))


def _joined(values: Sequence[Tensor], axis: int) -> Tensor:
    """torch.cat, without a copy of a single one."""
    return values[0] if len(values) == 1 else torch.cat(list(values), axis)
