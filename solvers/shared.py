"""One p, and one T where it is free, for a whole batch of experiments: minimise the sum of their costs.

The batch is ONE problem whose state is all states side by side, whose control is all controls: x ``(n * B)``, u
``(m * B)``. Any solver of discrete problems takes it as it is. Its stages do not couple the experiments, so DDP sweeps
over them as over a batch; only at the start their models are added up, and one step dp, one step size and one
regularisation hold for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.differential.sweep import CostToGo, Direction, minimise_start, sweep_path
from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import IMPLICIT
from ocnopt.linearise import expand_path, expand_terminal
from ocnopt.paths import Path, Widened
from ocnopt.solvers.audit import audit
from ocnopt.solvers.ddp import DDP, PreparedDDP
from ocnopt.solvers.direct.casadi_solver import CasADi
from ocnopt.solvers.indirect import Indirect
from ocnopt.solvers.kernels import Merit, Numbers
from ocnopt.solvers.search import TorchKernel
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import Index, Series, Stage, StagedOCP


@dataclass(frozen=True)
class Shared:
    """A solver for experiments that share their static controls.

    Raises:
        ProblemError: nothing is to be shared, sizes vary by stage, or the solver is one of continuous problems.
    """

    solver: Any
    problem: StagedOCP

    def __post_init__(self) -> None:
        _check(self.problem)
        collocated = isinstance(self.solver, CasADi) and self.solver.method == "collocation"
        if collocated or isinstance(self.solver, Indirect):
            name = "method='collocation'" if collocated else "solver='indirect'"
            raise ProblemError(
                f"shared_parameters=True came with {name}, which solves the continuous problem of one experiment; "
                "expected a solver of the discrete one: 'ddp', 'shooting', or 'casadi' by multiple shooting"
            )

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve from a guess whose p is the same for all experiments.

        Raises:
            ProblemError: guesses of p differ; whatever the solver refuses.
        """
        prepared = self.prepare(problem, guess)
        result = prepared.solve(problem, guess, progress=progress)
        return result._replace(build_time=result.build_time + getattr(prepared.solver, "build_time", 0.0))

    def prepare(self, problem: StagedOCP, guess: Guess) -> "PreparedShared":
        """Build the solver of the one problem.

        Raises:
            ProblemError: as for :meth:`solve`.
        """
        joint, start = join_experiments(problem), join_guess(problem, guess)
        if isinstance(self.solver, DDP):
            for name in ("terminal_constraint", "path_constraint", "state_bounds"):
                if getattr(problem, name) is not None:
                    raise ProblemError(
                        f"the problem has {name}; solver 'ddp' has no multipliers for it under shared_parameters=True: "
                        "use solver='casadi', or a penalty in the cost"
                    )
            if self.solver.restarts:
                raise ProblemError(
                    f"shared_parameters=True came with restarts={self.solver.restarts}, which choose among the answers "
                    "of each experiment; expected none: solve from several initial_guess= and compare the costs"
                )
            if self.solver.kernel == "lowered":
                raise ProblemError(
                    "shared_parameters=True came with kernel='lowered', which sweeps over one problem at a time; "
                    "expected kernel='torch' or 'auto'"
                )
            kernel = SharedKernel(Widened(problem))
            return PreparedShared(PreparedDDP(self.solver, kernel, 0.0, fixed=True))
        if problem.tableau is not None and problem.tableau.name in IMPLICIT:
            raise ProblemError(
                f"shared_parameters=True came with the implicit integrator {problem.tableau.name!r}; expected an "
                "explicit one for this solver, or solver 'ddp'"
            )
        prepare_it = getattr(self.solver, "prepare", None)
        return PreparedShared(self.solver if prepare_it is None else prepare_it(joint, start))


@dataclass(frozen=True)
class PreparedShared:
    """A solver built for one batch of experiments."""

    solver: Any

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the batch as it is now.

        Raises:
            ProblemError: as for :meth:`Shared.solve`.
        """
        joint, start = join_experiments(problem), join_guess(problem, guess)
        if isinstance(self.solver, PreparedDDP):
            # of the experiments, which the one problem is made of
            self.solver.kernel.refresh(problem)
        return _apart(problem, self.solver.solve(joint, start, progress=progress))


def _check(problem: StagedOCP) -> None:
    if not problem.batch_shape or not problem.parameter_dim:
        lacks = "no static controls" if problem.batch_shape else "no batch"
        raise ProblemError(
            f"shared_parameters=True came with a problem that has {lacks}; expected an initial state (*batch, n) and "
            "parameters= or a free horizon: leave shared_parameters out"
        )
    sizes = {group.stage.control_dim for group in problem.groups}
    if len(sizes) > 1 or len(set(problem.state_sizes)) > 1:
        raise ProblemError(
            "shared_parameters=True came with sizes that vary by stage; expected one state and one control size"
        )
    if problem.parameter_bounds is not None and problem.parameter_bounds[0].ndim > 1:
        raise ProblemError(
            "shared_parameters=True came with parameter_bounds for each problem, but p is one for all; expected one "
            "pair for all: scalars or vectors (q,)"
        )


@dataclass(frozen=True)
class _Beside:
    """B experiments side by side, ``(..., B d)``, and as a batch, ``(..., *batch, d)``."""

    batch: tuple[int, ...]

    @property
    def count(self) -> int:
        """B."""
        return math.prod(self.batch)

    def apart(self, v: Tensor) -> Tensor:
        """``(..., B d)`` as ``(..., *batch, d)``."""
        return v.unflatten(-1, (*self.batch, v.shape[-1] // self.count))

    def together(self, v: Tensor) -> Tensor:
        """``(..., *batch, d)`` as ``(..., B d)``."""
        return v.flatten(-1 - len(self.batch))

    def copies(self, p: Tensor) -> Tensor:
        """p ``(..., q)`` for each, ``(..., *batch, q)``."""
        lead, q = p.shape[:-1], p.shape[-1]
        return p.reshape(*lead, *(1,) * len(self.batch), q).expand(*lead, *self.batch, q)

    def total(self, cost: Tensor) -> Tensor:
        """The sum over the experiments of costs ``(..., *batch)``."""
        return cost.flatten(-len(self.batch)).sum(-1)

    def number(self, k: Index) -> Index:
        """Step numbers ``(...)``, for the batch."""
        return k if isinstance(k, int) else k.reshape(*k.shape, *(1,) * len(self.batch))


def join_experiments(problem: StagedOCP) -> StagedOCP:
    """The batch as one problem."""
    beside = _Beside(problem.batch_shape)
    count, apart, copies = beside.count, beside.apart, beside.copies

    def joint(stage: Stage) -> Callable[..., tuple[Tensor, Tensor]]:
        def step(k: Index, x: Tensor, u: Tensor, p: Tensor, *row: Tensor) -> tuple[Tensor, Tensor]:
            own = apart(row[0]) if row else None
            x_next, cost = problem.advance(stage, beside.number(k), apart(x), apart(u), copies(p), own)
            return beside.together(x_next), beside.total(cost)

        return step

    def terminal(x: Tensor, p: Tensor, *row: Tensor) -> Tensor:
        return beside.total(problem.terminal(apart(x), copies(p), apart(row[0]) if row else None))

    def along(k: Index, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return beside.together(problem.path_excess(beside.number(k), apart(x), apart(u), copies(p)))

    def end(x: Tensor, p: Tensor) -> Tensor:
        return beside.together(problem.end_error(apart(x), copies(p)))

    groups = tuple(
        replace(group, stage=Stage(None, None, count * group.stage.control_dim, joint(group.stage)))
        for group in problem.groups
    )
    return problem.altered(
        groups=groups,
        terminal_cost=terminal,
        initial_state=problem.initial_state.reshape(-1),
        control_bounds=tuple(_repeated(bounds, count) for bounds in problem.control_bounds),
        state_bounds=_repeated(problem.state_bounds, count),
        path_constraint=problem.path_constraint and along,
        terminal_constraint=problem.terminal_constraint and end,
        step_data=None if problem.step_data is None else problem.step_data.flatten(1),
        tableau=None,
        state_sizes=tuple(count * size for size in problem.state_sizes),
    )


def _repeated(bounds: Bounds | None, count: int) -> Bounds | None:
    if bounds is None:
        return None
    one = lambda side: side.flatten(1) if side.ndim > 2 else side.repeat(*(1,) * (side.ndim - 1), count)  # noqa: E731
    lower, upper = (one(side) for side in bounds)
    return lower, upper


def join_guess(problem: StagedOCP, guess: Guess) -> Guess:
    """The start of the one problem.

    Raises:
        ProblemError: the experiments start from different p.
    """
    p = guess.parameters.reshape(-1, guess.parameters.shape[-1])
    if not torch.equal(p, p[:1].expand_as(p)):
        raise ProblemError(
            "initial_guess has different parameters or horizons for experiments that share them; expected the same for "
            "all: pass one vector (q,), or one number"
        )
    states = None if guess.states is None else [x.reshape(-1) for x in guess.states]
    return Guess([u.reshape(-1) for u in guess.controls], p[0], states)


def _apart(problem: StagedOCP, result: Result) -> Result:
    """What was found, for each experiment; p and how the search went are the same for all."""
    batch, beside = problem.batch_shape, _Beside(problem.batch_shape)

    def own(values: Series, size: int) -> Tensor:
        return torch.stack(list(values)).reshape(len(values), *batch, size)

    n, m, q = problem.state_dim, problem.groups[0].stage.control_dim, problem.parameter_dim
    p = result.parameters.expand(*batch, q)
    states, controls = own(result.states, n), own(result.controls, m)
    seen = audit(problem, states, controls, p)
    gains = result.gains and (own(result.gains[0], m), torch.as_tensor(result.gains[1])[..., :n])
    multipliers = {name: beside.apart(torch.as_tensor(v)) for name, v in (result.multipliers or {}).items()}
    told = f"{result.status} for {math.prod(batch)} experiments with one p"
    return result._replace(
        states=states,
        controls=controls,
        parameters=p,
        cost=seen.cost,
        converged=result.converged.expand(batch),
        iterations=result.iterations.expand(batch),
        status=[told] * math.prod(batch),
        constraint_violation=seen.violation,
        history={name: v.reshape(-1, *(1,) * len(batch)).expand(-1, *batch) for name, v in result.history.items()},
        costates=None if result.costates is None else own(result.costates, n),
        gains=gains,
        saddle=None if result.saddle is None else result.saddle.expand(batch),
        multipliers=multipliers or None,
    )


class SharedKernel:
    """The kernel of the one problem: torch over the batch of experiments.

    Outside stands the one problem, z = (all x, p) ``(N + 1, *lead, B n + q)``; inside the batch, z ``(N + 1, *lead,
    *batch, n + q)`` with a copy of p each.
    """

    name, apart, window = "torch", False, 1

    def __init__(self, wide: Widened) -> None:
        self.inner, self._expanded = TorchKernel(wide), _NOTHING
        self._beside = _Beside(wide.problem.batch_shape)

    def refresh(self, problem: Any) -> None:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        self.inner.refresh(problem)
        self._expanded = _NOTHING

    def evaluate(self, states: Tensor, controls: Tensor, rows: Tensor | None = None) -> Path:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        return self._outside(self.inner.evaluate(self._each(states), self._beside.apart(controls)))

    def direction(self, path: Path, mu: Numbers, *, exact: bool) -> Direction:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        wide, own = self.inner.wide, self._inside(path)
        states, was_exact, *models = self._expanded
        if states is not path.states or (exact and not was_exact):
            models = [expand_path(wide, own, exact=exact), expand_terminal(wide, own.states[-1])]
            self._expanded = path.states, exact, *models
        steps, terminal = models
        steps = steps if exact else steps._replace(curvature=None)
        damping = torch.as_tensor(mu).to(own.cost).expand(own.cost.shape)
        found = sweep_path(wide, own, steps, terminal, damping, minimise_shared_start)
        return found._replace(
            k=found.k.flatten(1),
            costates=self._joined(found.costates),
            dp=found.dp.flatten(0, -2)[0],
            linear=found.linear.sum(),
            quadratic=found.quadratic.sum(),
            solvable=found.solvable.all(),
        )

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        own, wide, k = self._inside(path), self.inner.wide, self._beside.apart(direction.k)
        # the first path is rolled out without gains
        K = direction.K if direction.K.ndim > k.ndim else k.new_zeros(()).expand(*k.shape, wide.n)
        law = direction._replace(k=k, K=K, dp=direction.dp.expand(*own.cost.shape, wide.q))
        return self._outside(self.inner.roll_out(own, law, alphas))

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Numbers, alphas: Sequence[float]
    ) -> tuple[Path, Numbers] | None:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        return None

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """See :class:`ocnopt.solvers.kernels.Kernel`."""
        return self.inner.ladder(self._beside.count, alphas)

    def _each(self, z: Tensor) -> Tensor:
        """The joint z, for each experiment."""
        states = z.shape[-1] - self.inner.wide.q
        return torch.cat([self._beside.apart(z[..., :states]), self._beside.copies(z[..., states:])], dim=-1)

    def _joined(self, z: Tensor) -> Tensor:
        """What belongs to each experiment as the joint z, with the first one's p."""
        n, axes = self.inner.wide.n - self.inner.wide.q, len(self._beside.batch)
        return torch.cat([self._beside.together(z[..., :n]), z[..., n:].flatten(-1 - axes, -2)[..., 0, :]], dim=-1)

    def _inside(self, path: Path) -> Path:
        gaps = None if path.gaps is None else self._each(path.gaps)
        cost = path.cost.expand(self._beside.batch)
        return Path(self._each(path.states), self._beside.apart(path.controls), cost, gaps)

    def _outside(self, path: Path) -> Path:
        gaps = None if path.gaps is None else self._joined(path.gaps)
        controls, cost = self._beside.together(path.controls), self._beside.total(path.cost)
        return Path(self._joined(path.states), controls, cost, gaps)


_NOTHING: tuple[Any, ...] = (None, False)


def minimise_shared_start(value: CostToGo, q: int, damping: Tensor, room: Bounds | None) -> tuple[Tensor, CostToGo]:
    """Choose one step of the static controls for the whole batch: minimise the sum of the models.

    The results have the batch's axes; the predicted change belongs to each experiment.
    """
    axes = tuple(range(value.J.ndim - 1))
    total = CostToGo(value.V.sum(axes), value.J.sum(axes), value.solvable.all())
    first = (0,) * len(axes)
    one = None if room is None else (room[0][first], room[1][first])
    dp, chosen = minimise_start(total, q, damping[first], one)
    V, J, d = value.V.clone(), value.J.clone(), dp[:, None]
    Vpp, Vp = V[..., -q:, -q:], V[..., -q:, :1]
    V[..., :1, :1] += d.mT @ (2 * Vp + Vpp @ d)
    J[..., 0] += (dp * value.J[..., -q:]).sum(-1)
    return dp.expand(*value.J.shape[:-1], q), CostToGo(V, J, chosen.solvable.expand(value.solvable.shape))
