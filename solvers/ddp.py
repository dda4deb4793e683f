r"""Differential dynamic programming.

One iteration: a sweep backwards over local models of the path (gains), a search along the step (the feedback law rolled
out), accept or raise the regularisation. Static controls and a free T are part of the state with a free first value; an
infeasible start keeps gaps g_k = f(x_k, u_k) - x_{k+1}, which a step of size alpha shrinks to (1 - alpha) g_k.

Problems of a batch are independent: each has its own step size, regularisation and stop, and leaves when it is done.
What belongs to a problem is a row of every tensor, time in front where there is time: costs ``(B,)``, states ``(N + 1,
B, n)``; without a batch the axis B is missing.

The three things that cost time are the kernel's: evaluate a path, find a direction, roll the feedback law out.

Source: Mayne 1966; Tassa, Mansard and Todorov, ICRA 2014 (bounds); Mastalli et al., ICRA 2020 (gaps).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ocnopt.checks import can_differentiate, check_choice, finite_path, solver_options
from ocnopt.differential.sweep import Direction
from ocnopt.errors import ProblemError
from ocnopt.paths import Path, Widened
from ocnopt.solvers.augmented import first_augmented
from ocnopt.solvers.endings import History, Stopwatch, Tables, sentence
from ocnopt.solvers.kernels import Kernel, Numbers
from ocnopt.solvers.lowered.limits import fits
from ocnopt.solvers.remains import explained
from ocnopt.solvers.rounds import PreparedAugmented
from ocnopt.solvers.search import (
    Aim,
    Curvature,
    Iterate,
    Outcome,
    Progress,
    Record,
    TorchKernel,
    anywhere,
    begin,
    closed,
    each,
    ending,
    find_direction,
    judge,
    line_search,
    numbers,
    pick_rows,
    record,
    where,
)
from ocnopt.solvers.solution import Guess, Result
from ocnopt.solvers.starts import PreparedStarts, fit_together, repeated, stacked
from ocnopt.staged import Series, StagedOCP


class Start:
    """Problems that wait for their turn: the guess, one row for each."""

    def __init__(self, wide: Widened, kernel: Kernel, guess: Guess) -> None:
        first = wide.join([wide.problem.initial_state], guess.parameters)[0]
        controls = wide.join_controls(guess.controls)
        states = None if guess.states is None else wide.join(guess.states, guess.parameters)
        self.kernel, self.split, self.next = kernel, kernel.apart and first.ndim > 1, 0
        if self.split:
            first, controls = first.flatten(0, -2), controls.flatten(1, -2)
            states = None if states is None else states.flatten(1, -2)
        self.first, self.controls, self.states = first, controls, states
        self.wide = wide
        self.count, self.q = first[..., 0].numel(), wide.q

    @property
    def waiting(self) -> bool:
        """Whether any problem has not begun."""
        return self.next < self.count

    def admit(self, regularisation: float, room: int) -> tuple[Iterate, Progress]:
        """The first paths of the next problems."""
        rows = np.arange(self.next, min(self.next + room, self.count) if self.split else self.count)
        first, controls, states = self.first, self.controls, self.states
        own = torch.from_numpy(rows).to(first.device) if self.split else None
        if own is not None:
            first, controls = first[own], controls[:, own]
            states = None if states is None else states[:, own]
        self.next = self.next + len(rows)
        if states is None:
            path = roll_controls(self.kernel, first, controls, self.q, own)
        else:
            path = self.kernel.evaluate(states, controls, own)
        finite = is_finite(path)
        if not path.cost.ndim and not finite:
            steps = list(path.states if path.gaps is None else path.gaps)
            finite_path(steps, path.cost, self.wide.times(first))
        start = begin(path)
        zero, outcome = np.zeros_like(start.cost)[()], where(finite, Outcome.RUNNING, Outcome.NOT_FINITE)
        count = zero.astype(int)
        mu, row = zero + zero.dtype.type(regularisation), rows.reshape(count.shape)[()]
        return start, Progress(row, mu, zero, count, count, count, count + outcome)


def is_finite(path: Path) -> Numbers:
    """Whether cost, states and gaps of each problem are finite."""
    series = [path.states] if path.gaps is None else [path.states, path.gaps]
    if not path.cost.ndim:
        return np.bool_(all(np.isfinite(numbers(part)).all() for part in (path.cost, *series)))
    found = [torch.isfinite(part).all(-1).all(0) for part in series]
    return numbers(torch.isfinite(path.cost) & torch.stack(found).all(0))


def opened(iterate: Iterate) -> Iterate:
    """With gaps, zero where there were none."""
    path = iterate.path
    gaps = torch.zeros_like(path.states[1:]) if path.gaps is None else path.gaps
    return iterate._replace(path=path._replace(gaps=gaps))


def joined(*records: Record) -> Record:
    """Problems of several records behind each other."""
    return each(
        lambda axis, *values: torch.cat(values, axis) if isinstance(values[0], Tensor) else np.concatenate(values),
        *records,
    )


def unflattened(record: Record, shape: Sequence[int]) -> Record:
    """Problems in a row as a batch of that shape."""
    return each(lambda axis, value: value.reshape(*value.shape[:axis], *shape, *value.shape[axis + 1 :]), record)


def roll_controls(kernel: Kernel, first: Tensor, controls: Tensor, q: int, rows: Tensor | None) -> Path:
    """The path of given controls, for those rows of the batch."""
    lead = first.shape[:-1]
    k, nothing = torch.zeros_like(controls), first.new_zeros(lead)
    K = controls.new_zeros(()).expand(*controls.shape, first.shape[-1])
    states = first.expand(len(controls) + 1, *first.shape)
    still = Direction(k, K, states, first.new_zeros((*lead, q)), nothing, nothing, nothing == 0)
    trial = kernel.roll_out(Path(states, controls, nothing, None, rows), still, first.new_zeros(1))
    return Path(trial.states[:, 0], trial.controls[:, 0], trial.cost[0], None, rows)


@dataclass(frozen=True)
class DDP:
    """DDP with feedback gains, box bounds, constraints, infeasible start, static parameters, free T and batches.

    Attributes:
        curvature: "exact" keeps the second derivatives of the dynamics; "gauss_newton" (iLQR) drops them; "auto" is
            exact, and Gauss-Newton in iterations where the exact model is not convex. While gaps are open, "exact" does
            the same. Where a solve with exact curvature ends in a saddle, its status says so; it has ``converged``.
        max_iterations: sweeps allowed.
        tolerance: stop when the predicted decrease falls below ``tolerance**2 * (1 + |cost|)`` and every gap below
            ``tolerance``.
        time_limit: seconds after which a solve stops with what it has; None for no limit.
        regularisation: first value of mu, what moving costs (:mod:`ocnopt.differential.sweep`); it rises when a sweep
            or a line search fails.
        kernel: "torch" runs any function on any device; "lowered" runs expressions that CasADi makes of the functions,
            much faster for small problems; "auto" takes the lowered kernel where the problem is small and allows it.
            The status says which was used.
        compile: whether the lowered kernel is compiled, where the machine has a C compiler: "auto", if it was compiled
            before, or the batch is large, or the problem is prepared for many solves.
        restarts: how many further starts, slow waves around the given one, the problem is solved from. The lowest
            minimum is kept, all are listed in ``minima`` of the Solution.
        seed: of these starts.
        constraint_tolerance: how far terminal constraints, path constraints and state bounds may be broken.
        max_outer: how often a constrained problem is solved with better multipliers (:mod:`ocnopt.solvers.rounds`);
            ``max_iterations`` then counts the accepted steps of all these solves, and ``history`` shows one after the
            other, with what the constraints add to the cost.
    """

    curvature: Curvature = "auto"
    max_iterations: int = 500
    tolerance: float = 1e-8
    regularisation: float = 0.0
    time_limit: float | None = None
    kernel: Literal["auto", "torch", "lowered"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    restarts: int = 0
    seed: int = 0
    constraint_tolerance: float = 1e-8
    max_outer: int = 40

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "curvature": ("exact", "gauss_newton", "auto"),
            "kernel": ("auto", "torch", "lowered"),
            "compile": ("auto", True, False),
        }
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        positive = ["tolerance", "constraint_tolerance", *([] if self.time_limit is None else ["time_limit"])]
        solver_options(
            self,
            at_least={"max_iterations": 1, "max_outer": 1, "restarts": 0, "seed": 0},
            positive=positive,
            not_negative=["regularisation"],
        )

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve a discrete problem from a guess.

        Raises:
            ProblemError: the problem cannot be lowered, where ``kernel`` asks for it; torch.inference_mode() is on.
            NonFiniteError: the first path of a single problem is not finite.
        """
        prepared = self._build(problem, guess, self.compile, fixed=True)
        return prepared.solve(problem, guess, progress=progress)._replace(build_time=prepared.build_time)

    def prepare(self, problem: StagedOCP, guess: Guess) -> "PreparedDDP | PreparedAugmented | PreparedStarts":
        """Choose, build and compile the kernel; lowered functions are compared with torch near the guess's controls.

        Raises:
            ProblemError: as for :meth:`solve`.
        """
        return self._build(problem, guess, True if self.compile == "auto" else self.compile)

    def _build(
        self,
        problem: StagedOCP,
        guess: Guess,
        compile: bool | Literal["auto"],  # noqa: A002
        *,
        fixed: bool = False,
    ) -> "PreparedDDP | PreparedAugmented | PreparedStarts":
        can_differentiate()
        if self.restarts:
            together = fit_together(problem, self.restarts)
            one = replace(self, restarts=0)
            if together:
                problem, guess = repeated(problem, self.restarts + 1), stacked([guess] * (self.restarts + 1))
            inner = one._build(problem, guess, compile, fixed=fixed)
            return PreparedStarts(inner, together, self.restarts, self.seed, self.time_limit)
        began = time.perf_counter()
        with torch.no_grad():
            free = first_augmented(problem) if problem.constrained else problem
            kernel = self.make_kernel(Widened(free), guess, compile)
        prepared = PreparedDDP(self, kernel, time.perf_counter() - began, fixed)
        return PreparedAugmented(prepared) if problem.constrained else prepared

    def make_kernel(self, wide: Widened, guess: Guess, compile: bool | Literal["auto"] = "auto") -> Kernel:  # noqa: A002
        """What the iterations run on."""
        if self.kernel == "lowered" or (self.kernel == "auto" and fits(wide.problem) is None):
            from ocnopt.solvers.lowered.kernel import LoweredKernel

            try:
                return LoweredKernel(wide.problem, guess, compile=compile)
            except ProblemError:
                if self.kernel == "lowered":
                    raise
        return TorchKernel(wide)

    @np.errstate(all="ignore")
    def search(
        self, kernel: Kernel, start: Start, history: History, stopwatch: Stopwatch
    ) -> list[tuple[Iterate, Progress, Aim]]:
        """Work on a window of problems until all have ended, the time is up, or Ctrl-C was pressed."""
        ended: list[tuple[Iterate, Progress, Aim]] = []
        iterate, progress = start.admit(self.regularisation, kernel.window)
        history.add(progress, iterate.cost, np.zeros_like(iterate.cost), progress.row >= 0)
        while True:
            aim = find_direction(kernel, iterate, progress.mu, self.curvature)
            progress = judge(progress, iterate, aim, self.tolerance, self.max_iterations)
            if stopwatch.reason is not None:
                outcome = where(progress.running, stopwatch.reason, progress.outcome)
                progress = progress._replace(outcome=outcome)
            running = progress.running
            if not anywhere(running) and not start.waiting:
                return [*ended, (iterate, *ending(kernel, iterate, progress, aim, self.curvature))]
            if start.split and 8 * (~running).sum() >= running.size:
                left, rows = (~running).nonzero()[0], running.nonzero()[0]
                path, end = pick_rows(iterate, left), pick_rows(progress, left)
                ended.append((path, *ending(kernel, path, end, pick_rows(aim, left), self.curvature)))
                iterate, progress, aim = pick_rows(iterate, rows), pick_rows(progress, rows), pick_rows(aim, rows)
                running = progress.running
            if np.size(running):
                before = iterate.cost
                iterate, step = line_search(kernel, iterate, aim, running & aim.solvable)
                progress = record(progress, before, iterate, aim, step)
                history.add(progress, iterate.cost, step, running)
            if start.waiting and running.size < kernel.window:
                new, begun = start.admit(self.regularisation, kernel.window - running.size)
                history.add(begun, new.cost, np.zeros_like(new.cost), begun.row >= 0)
                iterate, progress = closed(joined(opened(iterate), opened(new))), joined(progress, begun)


@dataclass(frozen=True)
class PreparedDDP:
    """A solver for one problem, whose initial state, data and ``step_data`` may change.

    Where it is ``fixed``, the kernel is not asked to take them up, and what is left of a failure is told.
    """

    solver: DDP
    kernel: Kernel
    build_time: float
    fixed: bool = False

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the problem as it is now.

        Raises:
            ProblemError: something else of it has changed.
            NonFiniteError: as for :meth:`DDP.solve`.
        """
        if not self.fixed:
            self.kernel.refresh(problem)
        with Stopwatch(self.solver.time_limit) as stopwatch:
            result, outcome = self.run(problem, guess, stopwatch, progress=progress)
        # few iterations at a time are how many controllers solve: what is left of a search that ends early takes longer
        # to tell than they have
        if not self.fixed or bool(result.converged.all()):
            return result
        return explained(problem, result, outcome, self.kernel.name)

    def run(
        self, problem: StagedOCP, guess: Guess, stopwatch: Stopwatch, *, progress: bool = False
    ) -> tuple[Result, Tensor]:
        """As :meth:`solve`, and how it ended for each problem, an :class:`Outcome`."""
        began = time.perf_counter()
        with torch.no_grad():
            wide, history = Widened(problem), History(progress)
            ended = self.solver.search(self.kernel, Start(wide, self.kernel, guess), history, stopwatch)
            return _result(wide, ended, self.kernel, history, time.perf_counter() - began)


def _result(
    wide: Widened, ended: list[tuple[Iterate, Progress, Aim]], kernel: Kernel, history: History, wall_time: float
) -> tuple[Result, Tensor]:
    shape = wide.problem.batch_shape
    iterate, progress, aim = ended[0]
    if kernel.apart and shape:
        order = np.concatenate([part[1].row for part in ended]).argsort()
        columns: Any = zip(*((opened(iterate), *rest) for iterate, *rest in ended), strict=True)
        together: Any = [unflattened(pick_rows(joined(*column), order), shape) for column in columns]
        iterate, progress, aim = together
    path, direction = iterate.path, aim.direction
    told = (progress.outcome, Outcome.solved(progress.outcome), progress.iterations, iterate.gap_size)
    outcome, converged, iterations, gap = (torch.as_tensor(v, device=path.cost.device) for v in told)
    states, p = wide.split(path.states)
    result = Result(
        states=states,
        controls=wide.cut(path.controls, wide.control_sizes),
        parameters=p,
        cost=path.cost,
        converged=converged,
        saddle=outcome == Outcome.SADDLE,
        iterations=iterations,
        status=_status(progress, iterate, kernel.name),
        constraint_violation=gap,
        build_time=0.0,
        wall_time=wall_time,
        history=Tables(history, path.cost),
        costates=wide.split(direction.costates)[0],
        gains=(wide.cut(direction.k, wide.control_sizes), _cut_gains(wide, direction.K)),
    )
    return result, outcome


def _cut_gains(wide: Widened, K: Tensor) -> Series:
    """Feedback gains of x alone, a list where sizes vary."""
    sizes = list(zip(wide.control_sizes, wide.state_sizes, strict=False))
    if len(set(sizes)) == 1:
        return K[..., : wide.state_sizes[0]]
    return [gain[..., :m, :n] for gain, (m, n) in zip(K, sizes, strict=True)]


def _status(progress: Progress, iterate: Iterate, kernel: str) -> str | list[str]:
    """One sentence for each problem."""
    flat = [np.ravel(v).tolist() for v in (progress.outcome, progress.iterations, iterate.gap_size)]
    sentences = [sentence(kernel, *row) for row in zip(*flat, strict=True)]
    return sentences if np.ndim(iterate.cost) else sentences[0]
