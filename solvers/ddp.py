r"""Differential dynamic programming.

One iteration: expand the path (local models of every stage), sweep backwards (gains), search along the step (roll the
feedback law out), accept or raise the regularisation. Static controls and a free T are part of the state with a free
first value; an infeasible start keeps gaps g_k = f(x_k, u_k) - x_{k+1}, which a step of size alpha shrinks to (1 -
alpha) g_k. Problems of a batch are independent: each has its own step size, regularisation and stop.

Source: Mayne 1966; Tassa, Mansard and Todorov, ICRA 2014 (bounds, regularisation schedule); Mastalli et al., ICRA 2020
(gaps).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds, finite_path, nearest, no_constraints, solver_options
from ocnopt.differential.bellman import BellmanStage, bellman_step, minimise_start, terminal_value
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.expansion import StageModel, TerminalModel, expand_path, expand_terminal
from ocnopt.solvers.solution import Guess, Solution, make_solution
from ocnopt.staged import FeedbackLaw, StagedOCP, rollout, shoot, static_as_state

_MU_MIN, _MU_MAX = 1e-6, 1e12
# mu grows by _UP when nothing was accepted, falls by _DOWN after a step >= _LONG, rises by _DOWN after one < _SHORT:
# a fifth to a quarter fewer sweeps than the schedule of Tassa et al. 2012 on pendulum and cartpole swing-ups.
_UP, _DOWN, _LONG, _SHORT = 10.0, 3.0, 0.5, 0.1
# Gauss-Newton converges linearly and may creep on in the last digits: so many steps below rounding are the end too.
_IDLE = 5
# Step sizes beside the full one, tried in the same rollout where a batch is so small that only calls cost time.
_SMALL = 64
_ALPHAS = tuple(0.5**i for i in range(1, 14))

Curvature = Literal["exact", "gauss_newton", "auto"]


def rounding(cost: Tensor) -> Tensor:
    """Costs closer than this cannot be told apart in floating point."""
    return 64 * torch.finfo(cost.dtype).eps * (1 + cost.abs())


def picker(mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Choose for each problem of the batch: the first tensor where the mask holds, else the second."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.reshape((*mask.shape, *(1,) * (a.ndim - mask.ndim))), a, b)

    return pick


class Direction(NamedTuple):
    """Feedforward and feedback gains, costates, the step dp of the static controls, the predicted change of cost."""

    k: list[Tensor]
    K: list[Tensor]
    costates: list[Tensor]
    dp: Tensor
    linear: Tensor
    quadratic: Tensor
    solvable: Tensor

    def where(self, mask: Tensor, other: "Direction") -> "Direction":
        """This direction where the mask holds, the other elsewhere."""
        pick = picker(mask)
        k, K, costates = (list(map(pick, mine, others)) for mine, others in zip(self[:3], other[:3], strict=True))
        return Direction(k, K, costates, *map(pick, self[3:], other[3:]))


class Iterate(NamedTuple):
    """A path (states hold the static controls too), its cost, its gaps or None, and the merit's weight on them."""

    states: list[Tensor]
    controls: list[Tensor]
    cost: Tensor
    gaps: list[Tensor] | None
    weight: Tensor

    def gap_sum(self) -> Tensor:
        """Sum of |g_k| over the path, for each problem."""
        zero = torch.zeros_like(self.cost)
        return zero if self.gaps is None else torch.stack([gap.abs().sum(-1) for gap in self.gaps]).sum(0)

    def gap_size(self) -> Tensor:
        """The largest |g_k|, for each problem."""
        zero = torch.zeros_like(self.cost)
        return zero if self.gaps is None else torch.stack([gap.abs().amax(-1) for gap in self.gaps]).amax(0)

    def finite(self) -> Tensor:
        """Whether path and cost hold finite numbers."""
        return torch.stack([torch.isfinite(x).all(-1) for x in self.states]).all(0) & torch.isfinite(self.cost)

    def select(self, chosen: Tensor) -> "Iterate":
        """Pick a row of the leading axis for each problem."""

        def pick(value: Tensor) -> Tensor:
            index = chosen.reshape((1, *chosen.shape, *(1,) * (value.ndim - 1 - chosen.ndim)))
            return torch.gather(value, 0, index.expand(1, *value.shape[1:]))[0]

        gaps = None if self.gaps is None else [pick(gap) for gap in self.gaps]
        return Iterate(
            [pick(x) for x in self.states], [pick(u) for u in self.controls], pick(self.cost), gaps, pick(self.weight)
        )

    def replace_where(self, mask: Tensor, other: "Iterate") -> "Iterate":
        """The other iterate where the mask holds."""
        pick = picker(mask)
        gaps = None
        if self.gaps is not None and other.gaps is not None:
            gaps = [pick(b, a) for a, b in zip(self.gaps, other.gaps, strict=True)]
            gaps = gaps if any(bool((gap != 0).any()) for gap in gaps) else None
        return Iterate(
            [pick(b, a) for a, b in zip(self.states, other.states, strict=True)],
            [pick(b, a) for a, b in zip(self.controls, other.controls, strict=True)],
            pick(other.cost, self.cost),
            gaps,
            pick(other.weight, self.weight),
        )


def start(problem: StagedOCP, wide: StagedOCP, guess: Guess) -> Iterate:
    """The first path: controls rolled out, or the guessed states with their gaps.

    Raises:
        NonFiniteError: the path of a single problem is not finite; in a batch such a problem alone is given up.
    """
    q, p = problem.parameter_dim, guess.parameters
    states = None if guess.states is None else [torch.cat([x, p], dim=-1) if q else x for x in guess.states]
    if states is None:
        first = torch.cat([problem.initial_state, p], dim=-1) if q else problem.initial_state
        path = rollout(wide, guess.controls, first)
        iterate = Iterate(path.states, path.controls, path.cost, None, torch.zeros_like(path.cost))
    else:
        gaps, cost = shoot(wide, states, guess.controls, wide.start_parameters())
        iterate = Iterate(states, list(guess.controls), cost, gaps, torch.zeros_like(cost))
    if not problem.batch_shape:
        finite_path(iterate.states if iterate.gaps is None else iterate.gaps, iterate.cost, problem.times(p))
    return iterate


def expand_and_sweep(
    problem: StagedOCP, wide: StagedOCP, iterate: Iterate, mu: Tensor, curvature: Curvature
) -> Direction:
    """The direction at a path; for a non-convex exact model, where allowed, the Gauss-Newton direction instead."""
    models = expand_path(wide, iterate.states, iterate.controls, second_order=curvature != "gauss_newton")
    terminal = expand_terminal(wide, iterate.states[-1])
    direction = find_direction(problem, iterate, models, terminal, mu)
    if curvature == "gauss_newton":
        return direction
    # An infeasible path's costates belong to no trajectory: its exact curvature misleads more than it helps.
    keep = direction.solvable if curvature == "auto" else direction.solvable | (iterate.gap_size() == 0)
    if bool(keep.all()):
        return direction
    convex = find_direction(problem, iterate, [model._replace(fww=None) for model in models], terminal, mu)
    return direction.where(keep, convex)


def find_direction(
    problem: StagedOCP, iterate: Iterate, models: Sequence[StageModel], terminal: TerminalModel, mu: Tensor
) -> Direction:
    """Sweep backwards over the local models, then minimise over the static controls."""
    rooms = [_room(bounds, u) for bounds, u in zip(problem.step_bounds, iterate.controls, strict=True)]
    damping = {size: _damping(mu, size) for size in {u.shape[-1] for u in iterate.controls}}
    stages = [
        BellmanStage(model, room, damping[u.shape[-1]])
        for model, room, u in zip(models, rooms, iterate.controls, strict=True)
    ]
    end = terminal_value(terminal)
    value, gains = sweep(bellman_step, stages, end)
    q = problem.parameter_dim
    p = iterate.states[0][..., problem.state_dim :]
    dp = torch.zeros_like(p)
    if q > 0:
        dp, value = minimise_start(value, q, _damping(mu, q), _room(problem.parameter_bounds, p))
    return Direction(
        k=[gain.K[..., 0] for gain in gains],
        K=[gain.K[..., 1:] for gain in gains],
        costates=[*(gain.costate for gain in gains), end.J[..., 1:]],
        dp=dp,
        linear=value.linear,
        quadratic=value.quadratic,
        solvable=value.solvable & torch.isfinite(value.linear),
    )


def line_search(problem: StagedOCP, iterate: Iterate, direction: Direction, active: Tensor) -> tuple[Iterate, Tensor]:
    """Try the full step and shorter ones, many at once; each problem takes the longest that decreases its merit enough.

    Returns:
        The new iterate and the step taken, zero where none was.
    """
    step = torch.zeros_like(iterate.cost)
    small = iterate.cost.numel() <= _SMALL
    for alphas in ((1.0, *_ALPHAS),) if small else ((1.0,), _ALPHAS):
        open_ = active & (step == 0)
        if not bool(open_.any()):
            break
        trial, accepted = _try(problem, iterate, direction, step.new_tensor(alphas))
        accepted = accepted & open_
        chosen, found = accepted.to(torch.int8).argmax(0), accepted.any(0)
        if not bool(found.any()):
            continue
        step = torch.where(found, step.new_tensor(alphas)[chosen], step)
        iterate = iterate.replace_where(found, trial.select(chosen))
    return iterate, step


def _try(problem: StagedOCP, iterate: Iterate, direction: Direction, alphas: Tensor) -> tuple[Iterate, Tensor]:
    """Roll the feedback law out for each step size on a leading axis; which of them decrease the merit enough."""
    alpha = alphas.reshape((-1, *(1,) * iterate.cost.ndim))
    a, q = alpha[..., None], direction.dp.shape[-1]
    first = iterate.states[0].expand(len(alphas), *iterate.states[0].shape)
    if q > 0:
        first = torch.cat([first[..., :-q], first[..., -q:] + a * direction.dp], dim=-1)
    law = FeedbackLaw(iterate.states, iterate.controls, direction.k, direction.K, a, problem.step_bounds)
    left = None if iterate.gaps is None else [(1 - a) * gap for gap in iterate.gaps]
    path = rollout(problem, law, first, gaps=left)
    infeasible, weight = iterate.gap_sum(), iterate.weight
    if left is not None:
        # twice the smallest weight for which the step descends on cost + weight * |gaps| (Nocedal and Wright, 18.36)
        needed = 2 * (direction.linear + direction.quadratic.clamp_min(0)) / infeasible
        weight = torch.where(infeasible > 0, torch.maximum(weight, needed), weight)
    slope = weight * infeasible - direction.linear
    actual = iterate.cost - path.cost + weight * alpha * infeasible
    # a step predicted to gain less than rounding is taken if it loses no more
    enough = actual >= torch.minimum(1e-4 * alpha * slope, alpha * slope - rounding(iterate.cost))
    trial = Iterate(path.states, path.controls, path.cost, left, weight.expand_as(path.cost))
    return trial, enough & (slope >= 0) & trial.finite()


def _room(bounds: Bounds | None, value: Tensor) -> Bounds | None:
    return None if bounds is None else (bounds[0] - value, bounds[1] - value)


def _damping(mu: Tensor, size: int) -> Tensor:
    """Mu I, ``(..., size, size)``."""
    return mu[..., None, None] * torch.eye(size, dtype=mu.dtype, device=mu.device)


class Monitor:
    """Regularisation, stop and history of each problem of the batch."""

    def __init__(self, iterate: Iterate, regularisation: float, tolerance: float, progress: bool) -> None:
        self.mu = torch.full_like(iterate.cost, regularisation)
        self.tolerance = tolerance
        self.iterations = torch.zeros_like(iterate.cost, dtype=torch.int64)
        self.converged = torch.zeros_like(iterate.cost, dtype=torch.bool)
        self.failed = ~iterate.finite()
        self._stuck = torch.zeros_like(self.failed)
        self._restart = torch.zeros_like(iterate.cost)
        self._quiet = torch.zeros_like(self.iterations)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = [(iterate.cost, torch.zeros_like(iterate.cost), self.mu)]
        self._report: Callable[[str], None] = print if progress else _silent

    @property
    def sweeps(self) -> int:
        """Sweeps that a line search has followed."""
        return len(self._rows) - 1

    @property
    def active(self) -> Tensor:
        """Problems that still move."""
        return ~(self.converged | self.failed | self._stuck)

    def finished(self, iterate: Iterate, direction: Direction) -> bool:
        """Mark what has converged; whether nothing is left to do."""
        decrease = -(direction.linear + direction.quadratic)
        flat = (decrease.abs() <= self.tolerance**2 * (1 + iterate.cost.abs())) & (iterate.gap_size() <= self.tolerance)
        # no room to move at any mu: every gradient vanishes or pushes against a bound, whatever the curvature there
        idle = ((self._quiet >= _IDLE) | (decrease == 0)) & (iterate.gap_size() <= self.tolerance)
        self.converged = self.converged | (self.active & direction.solvable & ((flat & (self.mu <= _MU_MIN)) | idle))
        return not bool(self.active.any())

    def record(self, iterate: Iterate, direction: Direction, step: Tensor) -> None:
        """Count accepted steps and move mu: up on failure, down to zero on success."""
        moved, active = step > 0, self.active
        self.iterations = self.iterations + (moved & active)
        up = torch.maximum(_UP * self.mu, self._restart.clamp_min(_MU_MIN))
        down = torch.where(step >= _LONG, self.mu / _DOWN, torch.where(step >= _SHORT, self.mu, _DOWN * self.mu))
        down = torch.where(down < _MU_MIN, 0.0, down)
        small = (self._rows[-1][0] - iterate.cost).abs() <= rounding(iterate.cost)
        predicted = -(direction.linear + direction.quadratic) <= 1e3 * rounding(iterate.cost)
        # a sweep or search that failed on the way says nothing about progress
        self._quiet = torch.where(moved, torch.where(small & predicted, self._quiet + 1, 0), self._quiet)
        self._restart = torch.where(moved & (self.mu > 0), self.mu / _DOWN, self._restart)
        self.mu = torch.where(active, torch.where(moved, down, up), self.mu)
        self._stuck = self._stuck | (active & (self.mu > _MU_MAX))
        self._rows.append((iterate.cost, step, self.mu))
        cost, size, mu = float(iterate.cost.mean()), float(step.mean()), float(self.mu.max())
        self._report(f"{self.sweeps:4d}  cost {cost:.10g}  step {size:.3g}  mu {mu:.1e}")

    def history(self) -> dict[str, Tensor]:
        """cost, step and regularisation, ``(iterations + 1, ...)``, the start first."""
        return {
            name: torch.stack([row[i] for row in self._rows])
            for i, name in enumerate(("cost", "step", "regularisation"))
        }

    def status(self, iterate: Iterate) -> str | list[str]:
        """One sentence for each problem."""
        flat = [
            v.reshape(-1).tolist()
            for v in (self.converged, self.failed, self._stuck, self.iterations, iterate.gap_size())
        ]
        sentences = [_sentence(*row) for row in zip(*flat, strict=True)]
        return sentences if iterate.cost.ndim else sentences[0]


def _sentence(converged: bool, failed: bool, stuck: bool, iterations: int, gap: float) -> str:
    steps = f"{iterations} step{'' if iterations == 1 else 's'}"
    if converged:
        return f"converged after {steps}"
    if failed:
        return "given up: the first path is not finite; pass another initial_guess"
    gaps = f"; gaps up to {gap:.1e} are still open" if gap > 0 else ""
    if stuck:
        reason = "no step decreases the cost under the largest regularisation"
        return f"stopped after {steps}: {reason}{gaps}; look for a kink in the functions, or start elsewhere"
    advice = "raise max_iterations, or start from this solution"
    return f"stopped after {steps}: the iteration limit was reached{gaps}; {advice}"


def _silent(_: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class DDP:
    """DDP with feedback gains, box bounds, infeasible start, static parameters, free T and batches.

    Attributes:
        curvature: "exact" keeps the second derivatives of the dynamics; "gauss_newton" (iLQR) drops them; "auto" is
            exact, and Gauss-Newton in iterations where the exact model is not convex. While gaps are open, "exact" does
            the same.
        max_iterations: sweeps allowed.
        tolerance: stop when the predicted decrease falls below ``tolerance**2 * (1 + |cost|)`` and every gap below
            ``tolerance``.
        regularisation: first value of mu; it rises when a sweep or a line search fails.
    """

    curvature: Curvature = "auto"
    max_iterations: int = 500
    tolerance: float = 1e-8
    regularisation: float = 0.0

    def __post_init__(self) -> None:
        known = ("exact", "gauss_newton", "auto")
        if self.curvature not in known:
            hint = nearest(str(self.curvature), known)
            raise ProblemError(f"curvature is {self.curvature!r}; expected one of {', '.join(known)}{hint}")
        solver_options(self, at_least={"max_iterations": 1}, positive=["tolerance"], not_negative=["regularisation"])

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Solution:
        """Solve a discrete problem from a guess.

        Raises:
            ProblemError: the problem has terminal or path constraints, which need multipliers.
            NonFiniteError: the first path of a single problem is not finite.
        """
        no_constraints(problem, "ddp")
        began = time.perf_counter()
        with torch.no_grad():
            wide = static_as_state(problem)
            iterate = start(problem, wide, guess)
            monitor = Monitor(iterate, self.regularisation, self.tolerance, progress)
            direction = expand_and_sweep(problem, wide, iterate, monitor.mu, self.curvature)
            while not monitor.finished(iterate, direction) and monitor.sweeps < self.max_iterations:
                iterate, step = line_search(wide, iterate, direction, active=monitor.active & direction.solvable)
                monitor.record(iterate, direction, step)
                direction = expand_and_sweep(problem, wide, iterate, monitor.mu, self.curvature)
        return _solution(problem, iterate, direction, monitor, time.perf_counter() - began)


def _solution(problem: StagedOCP, iterate: Iterate, direction: Direction, monitor: Monitor, seconds: float) -> Solution:
    q, n = problem.parameter_dim, [x.shape[-1] - problem.parameter_dim for x in iterate.states]
    return make_solution(
        problem,
        states=[x[..., :size] for x, size in zip(iterate.states, n, strict=True)],
        controls=iterate.controls,
        parameters=iterate.states[0][..., n[0] : n[0] + q],
        cost=iterate.cost,
        converged=monitor.converged,
        iterations=monitor.iterations,
        status=monitor.status(iterate),
        constraint_violation=iterate.gap_size(),
        wall_time=seconds,
        build_time=0.0,
        history=monitor.history(),
        costates=[costate[..., :size] for costate, size in zip(direction.costates, n, strict=True)],
        gains=(direction.k, [K[..., :size] for K, size in zip(direction.K, n, strict=False)]),
    )
