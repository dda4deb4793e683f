"""Several starts of one solver: the lowest minimum is kept, and all distinct ones are listed.

The starts beside the given one add slow waves to its controls, u(s) + size * sum_j a_j cos(j pi s), s from 0 to 1:
white noise would average out along a path and lead back to the same minimum. A single problem's starts are one batch;
those of a batch are solved one after another by one kernel.

Shapes: S starts on an axis in front of the batch, behind time: states ``(N + 1, S, *batch, n)``.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocnopt.captured import belongs_to_each
from ocnopt.checks import Bounds, clipped
from ocnopt.paths import Widened
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import Series, StagedOCP

# Waves in a start, and their sizes in turn, relative to the room that a control has.
_WAVES, _SIZES = 4, (0.3, 1.0, 0.1, 3.0)
# Minima whose costs and paths agree to this, relative to their size, are one.
_SAME_COST, _SAME_PATH = 1e-6, 1e-3


@dataclass(frozen=True)
class PreparedStarts:
    """A solver for one problem that solves it from several starts.

    ``inner`` is built for the starts as one batch where ``together``, else for the problem itself.
    """

    inner: Any
    together: bool
    restarts: int
    seed: int
    time_limit: float | None

    @property
    def build_time(self) -> float:
        """Seconds that the kernel took."""
        built: float = self.inner.build_time
        return built

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the problem as it is now; raises as the solver inside does."""
        began, guesses = time.perf_counter(), starts(problem, guess, self.restarts, self.seed)
        if self.together:
            found = self.inner.solve(repeated(problem, len(guesses)), stacked(guesses), progress=progress)
        else:
            results: list[Result] = []
            with Stopwatch(self.time_limit) as stopwatch:
                for one in guesses:
                    if results and stopwatch.reason is not None:
                        break
                    results.append(self.inner.solve(problem, one, progress=progress))
            found = _stacked(results)
        return _best(problem, found)._replace(wall_time=time.perf_counter() - began)


def fit_together(problem: StagedOCP, restarts: int) -> bool:
    """Whether the starts can be one batch."""
    shared = not any(belongs_to_each(tensor, (restarts + 1,)) for tensor in problem.data)
    return not problem.batch_shape and problem.step_data is None and shared


def repeated(problem: StagedOCP, count: int) -> StagedOCP:
    """A single problem as a batch of the same."""
    return problem.altered(initial_state=problem.initial_state.expand(count, -1), traced_state=None)


def starts(problem: StagedOCP, guess: Guess, restarts: int, seed: int) -> list[Guess]:
    """The guess, and as many others around it, the same again for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [guess, *(_moved(problem, guess, _SIZES[i % len(_SIZES)], generator) for i in range(restarts))]


def _moved(problem: StagedOCP, guess: Guess, size: float, generator: torch.Generator) -> Guess:
    def noise(like: Tensor, *lead: int) -> Tensor:
        return torch.randn(*lead, *like.shape, generator=generator, dtype=torch.float64).to(like)

    N = len(guess.controls)
    widest = max(guess.controls, key=lambda u: u.shape[-1])
    s, j = torch.arange(N).to(widest) / max(1, N - 1), torch.arange(_WAVES).to(widest)
    waves = torch.cos(math.pi * s[:, None] * j) / (1 + j)
    moves = torch.tensordot(waves, noise(widest, _WAVES), 1)
    largest = torch.stack([u.abs().amax() for u in guess.controls if u.numel()] or [widest.new_zeros(())]).amax()
    controls = [
        clipped(u + size * _room(u, bounds, 1 + largest) * move[..., : u.shape[-1]], bounds)
        for u, move, bounds in zip(guess.controls, moves, problem.step_bounds, strict=True)
    ]
    p, bounds = guess.parameters, problem.parameter_bounds
    p = clipped(p + size * _room(p, bounds, 1 + p.abs()) * noise(p), bounds)
    return Guess(controls, p, guess.states)


def _room(value: Tensor, bounds: Bounds | None, free: Tensor) -> Tensor:
    """How far a value may reasonably move: half its bounds' width where they are finite."""
    if bounds is None:
        return free
    half = 0.5 * (bounds[1] - bounds[0])
    return torch.where(torch.isfinite(half), half, free.expand_as(value))


def stacked(guesses: Sequence[Guess]) -> Guess:
    """The guesses of a single problem as that of a batch."""

    def together(name: str) -> list[Tensor]:
        return [torch.stack(values) for values in zip(*(getattr(one, name) for one in guesses), strict=True)]

    states = None if guesses[0].states is None else together("states")
    return Guess(together("controls"), torch.stack([one.parameters for one in guesses]), states)


def _each(function: Callable[..., Any], *results: Result) -> dict[str, Any]:
    """Apply ``function(axis, *tensors)`` to what has an axis of starts; ``axis`` is where that stands."""

    def series(*values: Any) -> Series:
        if isinstance(values[0], Tensor):
            made: Tensor = function(1, *values)
            return made
        return [function(0, *row) for row in zip(*values, strict=True)]

    first = results[0]
    names = ("parameters", "cost", "converged", "saddle", "iterations", "constraint_violation")
    made: dict[str, Any] = {name: function(0, *(getattr(one, name) for one in results)) for name in names}
    for name in ("states", "controls", "costates"):
        made[name] = series(*(getattr(one, name) for one in results))
    made["gains"] = tuple(series(*parts) for parts in zip(*(one.gains or () for one in results), strict=True))
    made["history"] = {key: function(1, *(one.history[key] for one in results)) for key in first.history}
    made["multipliers"] = first.multipliers and {
        key: function(int(key != "terminal_constraint"), *((one.multipliers or {})[key] for one in results))
        for key in first.multipliers
    }
    return made


def _stacked(results: Sequence[Result]) -> Result:
    """Answers from several starts, as one with an axis of starts."""

    def together(axis: int, *values: Tensor) -> Tensor:
        longest = max(values, key=lambda v: len(v) if v.ndim else 0)
        if axis and any(len(v) != len(longest) for v in values):
            # histories: what has ended stays as it was
            values = tuple(torch.cat([v, v[-1:].expand(len(longest) - len(v), *v.shape[1:])]) for v in values)
        return torch.stack(values, dim=axis)

    status = [sentence for one in results for sentence in ([one.status] if isinstance(one.status, str) else one.status)]
    return results[0]._replace(**_each(together, *results), status=status)


def _best(problem: StagedOCP, found: Result) -> Result:
    """The lowest minimum of each problem; else what is most nearly feasible, then lowest."""
    cost, batch = found.cost.nan_to_num(torch.inf), problem.batch_shape
    count = math.prod(batch)
    status = [list(found.status[i * count : (i + 1) * count]) for i in range(len(cost))]
    minimum = found.converged if found.saddle is None else found.converged & ~found.saddle
    violation = torch.where(found.converged, 0.0, found.constraint_violation.nan_to_num(torch.inf))
    # by each in turn: a stable sort by the last one first
    order = torch.arange(len(cost), device=cost.device).reshape(-1, *(1,) * len(batch)).expand(cost.shape)
    for key in (cost, violation, (~minimum).to(cost.dtype), (~found.converged).to(cost.dtype)):
        order = order.gather(0, key.gather(0, order).argsort(dim=0, stable=True))
    index = order[0]

    def chosen(axis: int, value: Tensor) -> Tensor:
        places = index.reshape(*(1,) * (axis + 1), *batch, *(1,) * (value.ndim - axis - 1 - len(batch)))
        return torch.take_along_dim(value, places, dim=axis).squeeze(axis)

    minima = _distinct(problem, found, minimum, order)
    places, numbers = index.reshape(-1).tolist(), (minima["starts"] > 0).sum(-1).reshape(-1).tolist()
    told = [
        f"{status[place][row]}; the best of {len(cost)} starts, which led to {number} "
        f"{'minimum' if number == 1 else 'different minima'}"
        for row, (place, number) in enumerate(zip(places, numbers, strict=True))
    ]
    return found._replace(**_each(chosen, found), status=told if batch else told[0], minima=minima)


def _distinct(problem: StagedOCP, found: Result, minimum: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Different minima, the lowest first, as :class:`ocnopt.Solution` lists them."""
    wide, batch = Widened(problem), problem.batch_shape
    states, controls = (
        wide.join(found.states, found.parameters)[..., : wide.n - wide.q],
        wide.join_controls(found.controls),
    )
    X, U, P = states.movedim(0, -2), controls.movedim(0, -2), found.parameters
    flat = [v.reshape(len(v), math.prod(batch), *v.shape[1 + len(batch) :]) for v in (found.cost, X, U, P)]
    kept: list[list[int]] = []
    counts: list[list[int]] = []
    ranks, minima = order.reshape(len(order), -1), minimum.reshape(len(minimum), -1)
    for row in range(math.prod(batch)):
        own: list[int] = []
        seen: list[int] = []
        for i in (int(i) for i in ranks[:, row] if bool(minima[i, row])):
            same = [j for j in own if _alike(flat[0][i, row], flat[0][j, row], flat[1][i, row], flat[1][j, row])]
            if same:
                seen[own.index(same[0])] += 1
            else:
                own.append(i)
                seen.append(1)
        kept.append(own)
        counts.append(seen)
    most = max(map(len, kept))

    def listed(values: Tensor, fill: float) -> Tensor:
        rows = [
            torch.cat([values[own, row], values.new_full((most - len(own), *values.shape[2:]), fill)])
            for row, own in enumerate(kept)
        ]
        return torch.stack(rows).reshape(*batch, most, *values.shape[2:])

    starts_to = torch.tensor([[*seen, *[0] * (most - len(seen))] for seen in counts], dtype=torch.int64)
    named = zip(("cost", "states", "controls", "parameters"), flat, strict=True)
    return {"starts": starts_to.reshape(*batch, most), **{name: listed(value, torch.nan) for name, value in named}}


def _alike(cost: Tensor, other: Tensor, path: Tensor, another: Tensor) -> bool:
    apart = (path - another).abs().amax() > _SAME_PATH * (1 + another.abs().amax())
    return bool((cost - other).abs() <= _SAME_COST * (1 + other.abs())) and not bool(apart)
