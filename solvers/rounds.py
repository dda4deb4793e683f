"""The search for the multipliers: inner solves of the augmented Lagrangian, each started where the last one ended.

Every problem of a batch has its own multipliers, penalty and end; one that has ended keeps its path. Multipliers are
taken over from every inner solve; where |d - s| (see :mod:`ocnopt.solvers.augmented`) did not fall enough, the penalty
rises too.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.paths import Widened
from ocnopt.solvers.audit import audit, find_violations, placed
from ocnopt.solvers.augmented import FIRST_PENALTY, Multipliers, augment, distances, measure, no_multipliers
from ocnopt.solvers.endings import Stopwatch, sentence
from ocnopt.solvers.search import Outcome, choose
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import Series, StagedOCP

# The penalty's growth where the violation did not fall below _ENOUGH of what it was, and its largest value.
_UP, _ENOUGH, _CEILING = 10.0, 0.25, 1e8
# Multipliers that change by less, relative to the largest, are good, and so are those that no longer settle.
_STILL = 1e-7
# The first inner solve's tolerance, and its decrease from one to the next.
_LOOSE, _TIGHTER = 1e-2, 0.1
# An inner solve whose cost fell by more, relative to the start, ran away; from then on mu starts from _CAREFUL, and
# from _UP times more after each that does so again: where controls cost nothing, a first step leaves the model's reach.
_AWAY, _CAREFUL = 1e8, 1e-4


class Rounds(NamedTuple):
    """The search for the multipliers of each problem: ``misses`` is the largest |d - s| of the last inner solve."""

    multipliers: Multipliers
    penalty: Tensor
    misses: Tensor
    iterations: Tensor
    outcome: Tensor

    @property
    def running(self) -> Tensor:
        """Problems whose constraints are not met yet."""
        return self.outcome == Outcome.RUNNING


@dataclass(frozen=True)
class PreparedAugmented:
    """A solver for one constrained problem, around one for its augmented Lagrangian."""

    inner: Any

    @property
    def build_time(self) -> float:
        """Seconds that the kernel took."""
        built: float = self.inner.build_time
        return built

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve with better and better multipliers, each problem of a batch with its own, until all have ended.

        Raises:
            ProblemError, NonFiniteError: as :meth:`ocnopt.solvers.ddp.PreparedDDP.solve`.
        """
        began, solver = time.perf_counter(), self.inner.solver
        results: list[Result] = []
        with torch.no_grad(), Stopwatch(solver.time_limit) as stopwatch:
            rounds, regularisation = _first_round(problem), solver.regularisation
            for number in range(solver.max_outer):
                free = augment(problem, rounds.multipliers, rounds.penalty)
                loose = max(solver.tolerance, _LOOSE * _TIGHTER**number)
                left = solver.max_iterations - int(rounds.iterations[rounds.running].min())
                options = {"tolerance": loose, "max_iterations": left, "regularisation": regularisation}
                prepared = replace(self.inner, solver=replace(solver, **options))
                prepared.kernel.refresh(free)
                result, outcome = prepared.run(free, guess, stopwatch, progress=progress)
                # what has ended keeps its path
                results.append(_merged(rounds.running, result, results[-1]) if results else result)
                rounds = _next_round(problem, rounds, result, outcome, solver, final=loose == solver.tolerance)
                if not bool(rounds.running.any()):
                    break
                lost = _lost(outcome, result)
                if bool(lost.any()):
                    regularisation = max(_UP * regularisation, _CAREFUL)
                guess = _warm(lost, result, guess)
        result = _finished(problem, rounds, len(results), results[-1], self.inner)
        history = {name: torch.cat([one.history[name] for one in results]) for name in result.history}
        return result._replace(history=history, wall_time=time.perf_counter() - began)


def _first_round(problem: StagedOCP) -> Rounds:
    one = problem.initial_state.new_ones(problem.batch_shape)
    count = torch.zeros_like(one, dtype=torch.int64)
    return Rounds(no_multipliers(problem), FIRST_PENALTY * one, torch.inf * one, count, count + Outcome.RUNNING)


def _next_round(
    problem: StagedOCP, rounds: Rounds, result: Result, outcome: Tensor, solver: Any, *, final: bool
) -> Rounds:
    """Which problems have ended, and the multipliers and penalties of the others."""
    old, rho, running = rounds.multipliers, rounds.penalty, rounds.running
    wide = Widened(problem)
    g = measure(wide, wide.join(result.states, result.parameters), wide.join_controls(result.controls))
    s = [value / rho[..., None] for value in old]
    d = distances(problem, Multipliers(*(value + shift for value, shift in zip(g, s, strict=True))))
    misses = _largest([(new - shift).abs() for new, shift in zip(d, s, strict=True)], rho)
    solved = Outcome.solved(outcome)
    lost = _lost(outcome, result) | ~torch.isfinite(misses)
    slow = (misses > _ENOUGH * rounds.misses) & (misses > solver.constraint_tolerance)
    iterations = torch.where(running, rounds.iterations + result.iterations, rounds.iterations)
    sizes = _largest([value.abs() for value in old], rho)
    still = (rho * misses <= _STILL * (1 + sizes)) | (misses > _ENOUGH * rounds.misses)
    met, stopped = (misses <= solver.constraint_tolerance) & still, torch.zeros_like(running)
    for reason in (Outcome.LIMIT, Outcome.LATE, Outcome.INTERRUPTED, Outcome.NOT_FINITE):
        stopped = stopped | (outcome == reason)
    ended = torch.where(stopped | (lost & (rho >= _CEILING)), outcome, Outcome.RUNNING)
    # only a minimum says that there is nothing nearer
    given_up = torch.where(solved, Outcome.UNMET, outcome)
    ended = torch.where(~stopped & ~lost & slow & (rho >= _CEILING), given_up, ended)
    ended = torch.where(iterations >= solver.max_iterations, Outcome.LIMIT, ended)
    if final:
        ended = torch.where(met & (solved | (outcome == Outcome.STUCK)), outcome, ended)
    taken = running & ~lost
    new = [torch.where(taken[..., None], rho[..., None] * value, before) for value, before in zip(d, old, strict=True)]
    raised = torch.where(running & (slow | lost), (_UP * rho).clamp(max=_CEILING), rho)
    return Rounds(
        Multipliers(*new),
        raised,
        torch.where(taken, misses, rounds.misses),
        iterations,
        torch.where(running, ended, rounds.outcome),
    )


def _largest(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The largest entry of each problem; what has time in front has one axis more."""
    rows = [part if part.ndim == like.ndim + 1 else part.movedim(0, -2).flatten(-2) for part in parts]
    together = torch.cat(rows, dim=-1)
    return together.amax(-1) if together.shape[-1] else torch.zeros_like(like)


def _lost(outcome: Tensor, result: Result) -> Tensor:
    """Inner solves that ran away: a cost without a bound may have one under a larger penalty."""
    first = result.history["cost"][0]
    fell = (outcome == Outcome.STUCK) & (first - result.cost > _AWAY * (1 + first.abs()))
    return fell | (outcome == Outcome.UNBOUNDED) | (outcome == Outcome.NOT_SMOOTH)


def _warm(lost: Tensor, result: Result, before: Guess) -> Guess:
    """Where the next inner solve starts: at the last path, or where that was lost, at the one before."""

    def kept(old: Series, new: Series) -> list[Tensor]:
        return [torch.where(lost[..., None], a, b) for a, b in zip(old, new, strict=True)]

    p = torch.where(lost[..., None], before.parameters, result.parameters)
    closed = bool((result.constraint_violation == 0).all()) or bool(lost.any())
    return Guess(kept(before.controls, result.controls), p, None if closed else list(result.states))


def _merged(taken: Tensor, new: Result, old: Result) -> Result:
    """The new paths of the problems that are taken, the old ones of the others."""

    def series(fresh: Series, before: Series) -> Series:
        if isinstance(fresh, Tensor):
            return choose(taken, 1, fresh, torch.as_tensor(before))
        return [choose(taken, 0, a, b) for a, b in zip(fresh, before, strict=True)]

    names = ("states", "controls", "costates")
    made: dict[str, Any] = {name: series(getattr(new, name), getattr(old, name)) for name in names}
    made["gains"] = tuple(series(*pair) for pair in zip(new.gains or (), old.gains or (), strict=True))
    for name in ("parameters", "constraint_violation"):
        made[name] = choose(taken, 0, getattr(new, name), getattr(old, name))
    return new._replace(**made)


def _finished(problem: StagedOCP, rounds: Rounds, count: int, kept: Result, inner: Any) -> Result:
    """The result in terms of the problem itself."""
    outcome = torch.where(rounds.running, Outcome.ROUNDS, rounds.outcome)
    converged, shape = Outcome.solved(outcome), problem.batch_shape
    # data may carry gradients
    with torch.no_grad():
        numbers = audit(problem, kept.states, kept.controls, kept.parameters)
        worst = {} if bool(converged.all()) else _worst(problem, kept, inner.solver.constraint_tolerance)
    columns = (v.reshape(-1).tolist() for v in (outcome, rounds.iterations, kept.constraint_violation))
    rows = zip(*columns, itertools.product(*map(range, shape)), strict=True)
    status = [
        sentence(inner.kernel.name, end, steps, gap, count, worst.get(place, "")) for end, steps, gap, place in rows
    ]
    return kept._replace(
        cost=numbers.cost,
        converged=converged,
        iterations=rounds.iterations,
        status=status if shape else status[0],
        constraint_violation=numbers.violation,
        multipliers=rounds.multipliers.named(),
        saddle=outcome == Outcome.SADDLE,
    )


def _worst(problem: StagedOCP, kept: Result, tolerance: float) -> dict[tuple[int, ...], str]:
    """The constraint of each problem that is off by most, by its place in the batch, in the user's words."""
    found = find_violations(problem, kept.states, kept.controls, kept.parameters, tolerance)
    own = (one for one in reversed(found) if one.name in ("terminal_constraint", "path_constraint", "state_bounds"))
    step = lambda one: None if one.step == problem.steps else one.step  # noqa: E731
    return {one.problem: f"{placed(one.name, one.component, step(one))} is off by {one.value:.2g}" for one in own}
