"""The three things that DDP asks of a problem, on lowered functions.

A kernel evaluates a path with its gaps, sweeps backwards along it for a direction, and rolls the feedback law out. Here
the torch functions of the one step are lowered to CasADi once; everything else is made from them symbolically and runs
as a fold over time: on CasADi's virtual machine for a few problems, as numpy calls over many (see ``arrays``).

Shapes: time first, then the batch: states ``(N + 1, *lead, n)``, controls ``(N, *lead, m)``, gains ``(N, *lead, m,
n)``. The state z = (x, p) holds the static controls. Numbers are float64 on the CPU.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ocnopt.differential.steps import Direction, Path
from ocnopt.differential.sweep import CostToGo, minimise_start
from ocnopt.solvers.lowered.arrays import Arrays
from ocnopt.solvers.lowered.machine import Array, Machine
from ocnopt.solvers.lowered.problem import fits, lower_step, refused
from ocnopt.solvers.lowered.steps import Fold, Steps, make_steps
from ocnopt.solvers.solution import Guess
from ocnopt.staged import StagedOCP

# So many problems are run one by one: beyond, numpy's calls cost less.
_FEW = 96
# So many step sizes times problems are rolled out together.
_TOGETHER = 1024


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

    name, apart = "lowered", True

    def __init__(self, problem: StagedOCP, guess: Guess) -> None:
        """Lower a problem as ``transcribe`` returns it, or one with one Stage.

        Args:
            problem: its static controls are still parameters, not part of the state.
            guess: where the lowered functions are compared with torch.

        Raises:
            ProblemError: the problem is not for this kernel; the message says why.
        """
        reason = fits(problem)
        if reason is not None:
            raise refused(reason)
        step, end = lower_step(problem, guess.controls[0], guess.parameters)
        bounds = problem.control_bounds[0]
        box = None if bounds is None else (bounds[0].tolist(), bounds[1].tolist())
        self.q, self.m = problem.parameter_dim, problem.groups[0].stage.control_dim
        self.n, self.length = problem.state_dim + self.q, problem.steps
        self.parameter_bounds = problem.parameter_bounds
        self._steps: Steps = make_steps(step, end, self.n, self.m, self.q, box)
        self._numbers = np.arange(self.length, dtype=float)[:, None, None]
        self._backwards = np.ascontiguousarray(self._numbers[::-1])
        self._no_gaps = np.zeros((self.length, 1, self.n))
        self._runners: dict[tuple[type, str], Machine | Arrays] = {}

    def evaluate(self, states: Tensor, controls: Tensor) -> Path:
        """The gaps and the cost of a given path, ``(N + 1, *lead, n)`` and ``(N, *lead, m)``."""
        lead = controls.shape[1:-1]
        z, u = _rows(states), _rows(controls)
        (cost,), (gaps,) = self._run(self._steps.gaps, [np.zeros((z.shape[1], 1))], [self._numbers, z[:-1], u, z[1:]])
        return Path(states, controls, _tensor(self._total(cost, z), lead, 0)[..., 0], _tensor(gaps, lead))

    def direction(self, path: Path, mu: Tensor, *, exact: bool) -> Direction:
        """Sweep backwards along a path, then minimise over the static controls.

        Args:
            path: ``lead`` is the batch.
            mu: the regularisation of each problem, ``(*batch)``.
            exact: keep the second derivatives of the dynamics.
        """
        lead = path.cost.shape
        z, u = _rows(path.states), _rows(path.controls)
        _, (V, J) = self._run(self._steps.end_value, [], [z[-1:]])
        gaps = self._no_gaps if path.gaps is None else _rows(path.gaps)[::-1]
        damping = np.broadcast_to(_rows(mu[None, ..., None]), (self.length, z.shape[1], 1))
        given = [self._backwards, z[-2::-1], u[::-1], gaps, damping]
        fold = self._steps.exact if exact else self._steps.gauss_newton
        start, (k, K, Jz) = self._run(fold, [V[0], J[0], np.ones((z.shape[1], 1))], given)
        dp, linear, quadratic, solvable = self._minimise_start(path, start, mu)
        return Direction(
            _tensor(k[::-1], lead),
            _tensor(K[::-1], lead).reshape(self.length, *lead, self.m, self.n),
            _tensor(np.concatenate([Jz[::-1], J[..., 1:]]), lead),
            dp,
            linear,
            quadratic,
            solvable & torch.isfinite(linear),
        )

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
        rolled = [self._roll_out(path, direction, some) for some in alphas.split(together)]
        columns = zip(*rolled, strict=True)
        states, controls, cost = (_joined(parts, axis) for parts, axis in zip(columns, (1, 1, 0), strict=True))
        if path.gaps is None:
            return Path(states, controls, cost, None)
        left = (1 - alphas).reshape(-1, *(1,) * (path.gaps.ndim - 1)) * path.gaps[:, None]
        return Path(states, controls, cost, left)

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """Step sizes one by one for a few problems; over many a call costs the same for three."""
        return [(alpha,) for alpha in alphas] if lanes <= _FEW else (alphas[:1], alphas[1:4], alphas[4:])

    def _roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States, controls and costs for some step sizes at once."""
        count, lead = len(alphas), (len(alphas), *path.cost.shape)
        first = path.states[0].expand(*lead, self.n)
        if self.q > 0:
            moved = alphas.reshape(-1, *(1,) * direction.dp.ndim) * direction.dp
            first = torch.cat([first[..., : -self.q], first[..., -self.q :] + moved], dim=-1)
        z0 = _rows(first[None])[0]
        law = [_rows(x) for x in (path.states[:-1], path.controls, direction.k, direction.K.flatten(-2))]
        law.append(self._no_gaps if path.gaps is None else _rows(path.gaps))
        # what has one lane is the same for all
        law = [np.tile(x, (1, count, 1)) if count > 1 and x.shape[1] > 1 else x for x in law]
        alpha = np.broadcast_to(alphas.numpy().repeat(path.cost.numel())[:, None], (self.length, len(z0), 1))
        given = [self._numbers, *law, alpha]
        (_, cost), (z, u) = self._run(self._steps.walk, [z0, np.zeros((len(z0), 1))], given)
        return _tensor(z, lead), _tensor(u, lead), _tensor(self._total(cost, z), lead, 0)[..., 0]

    def _total(self, cost: Array, z: Array) -> Array:
        """The cost along the path and at its end."""
        _, (phi,) = self._run(self._steps.end, [], [z[-1:]])
        return cost + phi[0]

    def _minimise_start(self, path: Path, start: Sequence[Array], mu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step of the static controls, and the predicted change of cost with its flag."""
        lead, q = path.cost.shape, self.q
        V, J, solvable = (_tensor(part, lead, 0) for part in start)
        p, fine = path.states[0][..., self.n - q :], solvable[..., 0] > 0
        if q == 0:
            return p, J[..., 0], 0.5 * V[..., 0] - J[..., 0], fine
        i = torch.arange(self.n + 1)
        low, high = torch.minimum(i, i[:, None]), torch.maximum(i, i[:, None])
        value = CostToGo(V[..., high * (high + 1) // 2 + low], J, fine)
        bounds = self.parameter_bounds
        room = None if bounds is None else (bounds[0] - p, bounds[1] - p)
        dp, value = minimise_start(value, q, mu[..., None, None] * torch.eye(q, dtype=p.dtype), room)
        return dp, value.linear, value.quadratic, value.solvable

    def _run(self, fold: Fold, carried: Sequence[Array], given: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """A fold over the horizon, or one step where nothing is carried."""
        lanes = max([x.shape[0] for x in carried] + [x.shape[1] for x in given])
        runner = Machine if lanes <= _FEW else Arrays
        key = (runner, fold.function.name())
        if key not in self._runners:
            self._runners[key] = runner(fold, self.length if fold.carried else 1)
        return self._runners[key](carried, given)


def _rows(values: Tensor) -> Array:
    """``(time, *lead, d)`` as ``(time, lanes, d)``."""
    return values.detach().numpy().reshape(values.shape[0], values.shape[1:-1].numel(), values.shape[-1])


def _tensor(values: Array, lead: Sequence[int], time: int = 1) -> Tensor:
    """Inverse of :func:`_rows`."""
    own = torch.from_numpy(np.ascontiguousarray(values))
    return own.reshape(*values.shape[:time], *lead, values.shape[-1])


def _joined(values: Sequence[Tensor], axis: int) -> Tensor:
    """torch.cat, without a copy of a single one."""
    return values[0] if len(values) == 1 else torch.cat(list(values), axis)
