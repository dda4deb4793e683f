r"""The search of a descent method: which step to take along a direction, how to regularise the next, when to stop.

Every problem of a batch has its own step size, regularisation and end. What belongs to a problem is a row of every
tensor, time in front where there is time: costs ``(B,)``, states ``(N + 1, B, n)``; without a batch the axis B is
missing.

Source: Tassa, Mansard and Todorov, ICRA 2014 (regularisation schedule); Nocedal and Wright 2006, 18.36 (merit of gaps).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ocnopt.captured import belongs_to_each
from ocnopt.differential.sweep import Direction, sweep_path
from ocnopt.linearise import expand_path, expand_terminal
from ocnopt.paths import FeedbackLaw, Path, Widened, evaluate, rows_stand_alone, walk
from ocnopt.solvers.kernels import Kernel, Merit

_MU_MIN, _MU_MAX = 1e-6, 1e12
# mu grows by _UP when nothing was accepted, falls by _DOWN after a step >= _LONG, rises by _DOWN after one < _SHORT:
# a fifth to a quarter fewer sweeps than the schedule of Tassa et al. 2012 on pendulum and cartpole swing-ups.
_UP, _DOWN, _LONG, _SHORT = 10.0, 3.0, 0.5, 0.1
# Gauss-Newton converges linearly and may creep on in the last digits: so many steps below rounding are the end too.
_IDLE = 5
# Damping up to this hides no gain that is worth a step.
_MILD = 1e-2
# All step sizes are tried in one rollout where a batch is so small that only calls cost time.
_SMALL = 64
# Step sizes: from the full one down.
_ALPHAS = tuple(0.5**i for i in range(14))
# A cost below this is taken to have no lower bound.
_BOTTOM = -1e20


Curvature = Literal["exact", "gauss_newton", "auto"]


class TorchKernel:
    """The kernel for any function and any device."""

    name, window = "torch", 512

    def __init__(self, wide: Widened) -> None:
        self.wide = wide
        own = any(belongs_to_each(tensor, wide.problem.batch_shape) for tensor in wide.problem.data)
        self.apart = not own and rows_stand_alone(wide)
        self._expanded: tuple[Any, ...] = (None, None, False)

    def refresh(self, problem: Any) -> None:
        """See :class:`Kernel`."""
        self.wide, self._expanded = Widened(problem), (None, None, False)

    def evaluate(self, states: Tensor, controls: Tensor, rows: Tensor | None = None) -> Path:
        """See :class:`Kernel`."""
        return evaluate(self._of(rows), states, controls)._replace(rows=rows)

    def direction(self, path: Path, mu: Tensor, *, exact: bool) -> Direction:
        """See :class:`Kernel`; a path swept again, with another mu, is not expanded again."""
        states, controls, was_exact, *models = self._expanded
        if states is not path.states or controls is not path.controls or (exact and not was_exact):
            wide = self._of(path.rows)
            models = [expand_path(wide, path, exact=exact), expand_terminal(wide, path.states[-1])]
            self._expanded = path.states, path.controls, exact, *models
        steps, terminal = models
        return sweep_path(self.wide, path, steps if exact else steps._replace(curvature=None), terminal, mu)

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """See :class:`Kernel`."""
        a, start = alphas.reshape((-1, *(1,) * path.states[0].ndim)), path.states[0]
        start = start.expand(len(alphas), *start.shape)
        if self.wide.q:
            start = torch.cat([start[..., : -self.wide.q], start[..., -self.wide.q :] + a * direction.dp], dim=-1)
        law = FeedbackLaw(path.states, path.controls, direction.k, direction.K, a, self.wide.control_bounds)
        gaps = None if path.gaps is None else (1 - a) * path.gaps[:, None]
        return walk(self._of(path.rows), law, start, gaps)

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Tensor, alphas: Sequence[float]
    ) -> tuple[Path, Tensor] | None:
        """See :class:`Kernel`."""
        return None

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """See :class:`Kernel`."""
        return (alphas,) if lanes <= _SMALL else (alphas[:1], alphas[1:])

    def _of(self, rows: Tensor | None) -> Widened:
        """The problem as it is for some rows of its batch."""
        table = self.wide.problem.step_data
        if rows is None or table is None:
            return self.wide
        flat = table.flatten(1, -2)[:, rows.to(table.device)]
        return Widened(self.wide.problem.altered(step_data=flat))


class Iterate(NamedTuple):
    """A path with the sum and the largest of its |gaps|, and the weight of the sum in the merit of the search."""

    states: Tensor
    controls: Tensor
    cost: Tensor
    gaps: Tensor | None
    rows: Tensor | None
    gap_sum: Tensor
    gap_size: Tensor
    weight: Tensor

    @property
    def path(self) -> Path:
        """The path alone."""
        return Path(*self[:5])


def begin(path: Path) -> Iterate:
    """A path before the first step."""
    zero = torch.zeros_like(path.cost)
    if path.gaps is None:
        return Iterate(*path, zero, zero, zero)
    size = path.gaps.abs()
    return Iterate(*path, size.sum(-1).sum(0), size.amax(-1).amax(0), zero)


def alike(first: Iterate, second: Iterate) -> tuple[Iterate, Iterate]:
    """Both with gaps, zero where one had none, or both without."""
    if (first.gaps is None) == (second.gaps is None):
        return first, second
    one, other = (
        part if part.gaps is not None else part._replace(gaps=torch.zeros_like(part.states[1:]))
        for part in (first, second)
    )
    return one, other


def moved_to(iterate: Iterate, path: Path, step: Tensor, weight: Tensor) -> Iterate:
    """The path that a step leads to: of every gap, 1 - step is left."""
    rows = None if iterate.rows is None else iterate.rows.expand(path.cost.shape)
    if iterate.gaps is None:
        return Iterate(*path[:3], None, rows, *(part.expand_as(path.cost) for part in iterate[5:]))
    left = (1 - step).expand_as(path.cost)
    gaps = left[..., None] * iterate.gaps if path.gaps is None else path.gaps
    sums = left * iterate.gap_sum, left * iterate.gap_size, weight.expand_as(path.cost)
    return Iterate(*path[:3], gaps, rows, *sums)


class Outcome:
    """How the search for one problem ended, if it has."""

    RUNNING, CONVERGED, NOT_FINITE, STUCK, LIMIT, NOT_SMOOTH, UNBOUNDED, LATE, INTERRUPTED, UNMET, ROUNDS = range(11)
    SADDLE = 11

    @staticmethod
    def solved(outcome: Tensor) -> Tensor:
        """Which searches ended where no first-order step descends."""
        return (outcome == Outcome.CONVERGED) | (outcome == Outcome.SADDLE)


class Progress(NamedTuple):
    """The search for each problem: its place in the batch, regularisation mu and where mu jumps to after a failure.

    ``quiet`` counts accepted steps in a row that changed nothing, ``iterations`` accepted steps, ``sweeps`` all.
    """

    row: Tensor
    mu: Tensor
    restart: Tensor
    quiet: Tensor
    iterations: Tensor
    sweeps: Tensor
    outcome: Tensor

    @property
    def running(self) -> Tensor:
        """Problems that still move."""
        return self.outcome == Outcome.RUNNING


Record = TypeVar("Record", Iterate, Progress, Direction)
_TIMED = ("states", "controls", "gaps", "k", "K", "costates")


def each(function: Callable[..., Tensor], *records: Record) -> Record:
    """Apply ``function(axis, *values)`` to every field, the problems of the batch standing along that axis."""
    fields = zip(records[0]._fields, zip(*records, strict=True), strict=True)
    made = {name: None if values[0] is None else function(int(name in _TIMED), *values) for name, values in fields}
    return records[0]._replace(**made)  # type: ignore[arg-type]


def rounding(cost: Tensor) -> Tensor:
    """Costs closer than this cannot be told apart in floating point."""
    return 64 * torch.finfo(cost.dtype).eps * (1 + cost.abs())


def choose(mask: Tensor, axis: int, value: Tensor, other: Tensor) -> Tensor:
    """The value where the mask of the problems holds, else the other."""
    shape = ((1,) * axis) + mask.shape + (1,) * (value.ndim - axis - mask.ndim)
    return torch.where(mask.reshape(shape), value, other)


def find_direction(kernel: Kernel, iterate: Iterate, mu: Tensor, curvature: Curvature) -> tuple[Direction, Tensor]:
    """The direction at a path; for a non-convex exact model, where allowed, the Gauss-Newton direction instead.

    Returns:
        The direction, and which models are convex; "gauss_newton" asks for none that might not be.
    """
    direction = kernel.direction(iterate.path, mu, exact=curvature != "gauss_newton")
    convex = direction.solvable
    if curvature == "gauss_newton":
        return direction, torch.ones_like(convex)
    # An infeasible path's costates belong to no trajectory: its exact curvature misleads more than it helps.
    keep = direction.solvable if curvature == "auto" else direction.solvable | (iterate.gap_size == 0)
    if bool(keep.all()):
        return direction, convex
    rows = (~keep).nonzero()
    # the torch kernel has expanded the whole path already, and would expand a part of it anew
    share = 0.25 if kernel.name == "torch" else 0.9
    if kernel.apart and keep.ndim == 1 and len(rows) <= share * keep.numel():
        rows = rows[:, 0]
        some = kernel.direction(pick_rows(iterate, rows).path, mu[rows], exact=False)
        return put_rows(direction, rows, some), convex
    other = kernel.direction(iterate.path, mu, exact=False)
    return each(lambda axis, exact, instead: choose(keep, axis, exact, instead), direction, other), convex


def ending(
    kernel: Kernel, iterate: Iterate, progress: Progress, direction: Direction, convex: Tensor, curvature: Curvature
) -> tuple[Progress, Direction]:
    """Ends as they are without regularisation: a minimum with the gains that it has then, or a saddle.

    Eliminating the controls one after another is a factorisation of the cost's Hessian: it has a negative eigenvalue
    where, and only where, some Q_uu has.
    """
    converged = progress.outcome == Outcome.CONVERGED
    unsure = converged & ((progress.mu > 0) | ~convex)
    if not bool(unsure.any()):
        return progress, direction
    free, convex = find_direction(kernel, iterate, torch.zeros_like(progress.mu), curvature)
    chosen = unsure & (progress.mu > 0) & free.solvable
    direction = each(lambda axis, new, old: choose(chosen, axis, new, old), free, direction)
    unsure = unsure & ~convex
    if bool(unsure.any()):
        # a direction along which nothing changes, or only by rounding, makes no saddle
        flat = kernel.direction(iterate.path, torch.full_like(progress.mu, _MU_MIN), exact=True).solvable
        progress = progress._replace(outcome=torch.where(unsure & ~flat, Outcome.SADDLE, progress.outcome))
    return progress, direction


def line_search(kernel: Kernel, iterate: Iterate, direction: Direction, active: Tensor) -> tuple[Iterate, Tensor]:
    """Try the full step and shorter ones; each problem takes the longest that decreases its merit enough.

    Returns:
        The new iterate and the step taken, zero where none was.
    """
    weight, merit = weigh(iterate, direction)
    searched = kernel.search(iterate.path, direction, merit, active, _ALPHAS)
    if searched is not None:
        path, step = searched
        weight = weight if path.gaps is None else torch.where(step > 0, weight, iterate.weight)
        return moved_to(iterate, path._replace(gaps=None), step, weight), step
    step = torch.zeros_like(iterate.cost)
    for sizes in kernel.ladder(active.numel(), _ALPHAS):
        open_ = active & (step == 0)
        if not bool(open_.any()):
            break
        alphas = step.new_tensor(sizes)
        if kernel.apart and open_.ndim == 1 and 2 * int(open_.sum()) <= open_.numel():
            rows = open_.nonzero()[:, 0]
            moved, found = search_some(kernel, pick_rows(iterate, rows), pick_rows(direction, rows), alphas)
            iterate, step = put_rows(iterate, rows, moved), step.index_copy(0, rows, found)
        else:
            moved, found = search_some(kernel, iterate, direction, alphas, open_)
            iterate, step = moved, torch.where(open_, found, step)
    return iterate, step


def joined(*records: Record) -> Record:
    """Problems of several records behind each other."""
    return each(lambda axis, *values: torch.cat(values, axis), *records)


def unflattened(record: Record, shape: Sequence[int]) -> Record:
    """Problems in a row as a batch of that shape."""
    return each(lambda axis, value: value.unflatten(axis, tuple(shape)), record)


def pick_rows(record: Record, rows: Tensor) -> Record:
    """Some problems of a batch."""
    return each(lambda axis, value: value.index_select(axis, rows), record)


def put_rows(record: Record, rows: Tensor, some: Record) -> Record:
    """A batch with some of its problems replaced."""
    return each(lambda axis, value, new: value.index_copy(axis, rows, new), record, some)


def weigh(iterate: Iterate, direction: Direction) -> tuple[Tensor, Merit]:
    """The weight of the gaps and what a step must gain."""
    infeasible, weight, slack = iterate.gap_sum, iterate.weight, rounding(iterate.cost)
    if iterate.gaps is None:
        slope = -direction.linear
        return weight, Merit(infeasible, slope, 1e-4 * slope, slack)
    # twice the smallest weight for which the step descends on cost + weight * |gaps| (Nocedal and Wright, 18.36)
    needed = 2 * (direction.linear + direction.quadratic.clamp_min(0)) / infeasible
    weight = torch.where(infeasible > 0, torch.maximum(weight, needed), weight)
    penalty = weight * infeasible
    slope = penalty - direction.linear
    return weight, Merit(penalty, slope, 1e-4 * slope, slack)


def search_some(
    kernel: Kernel, iterate: Iterate, direction: Direction, alphas: Tensor, allowed: Tensor | None = None
) -> tuple[Iterate, Tensor]:
    """Roll the feedback law out for every step size and take the longest that decreases the merit enough."""
    trial = kernel.roll_out(iterate.path, direction, alphas)
    alpha = alphas.reshape((-1, *(1,) * iterate.cost.ndim))
    weight, merit = weigh(iterate, direction)
    gain = iterate.cost - trial.cost + alpha * merit.penalty
    # a step predicted to gain less than rounding is taken if it loses no more
    enough = gain >= torch.minimum(alpha * merit.least, alpha * merit.slope - merit.slack)
    accepted = enough & (merit.slope >= 0) & torch.isfinite(trial.cost) & torch.isfinite(trial.states).all(-1).all(0)
    accepted = accepted if allowed is None else accepted & allowed
    chosen, found = accepted.to(torch.int8).argmax(0), accepted.any(0)
    if not bool(found.any()):
        return iterate, torch.zeros_like(iterate.cost)
    tried = moved_to(iterate, trial, alpha, weight)
    if len(alphas) == 1 and bool(found.all()):
        return each(lambda axis, candidates: candidates.select(axis, 0), tried), alphas[0].expand(iterate.cost.shape)

    def taken(axis: int, now: Tensor, candidates: Tensor) -> Tensor:
        index = chosen.reshape((1,) * (axis + 1) + chosen.shape + (1,) * (now.ndim - axis - chosen.ndim))
        index = index.expand(*now.shape[:axis], 1, *now.shape[axis:])
        return choose(found, axis, torch.gather(candidates, axis, index).squeeze(axis), now)

    return each(taken, iterate, tried), torch.where(found, alphas[chosen], 0.0)


def numbers(*tensors: Tensor) -> list[Any]:
    """One number of each problem, as numpy arrays: over so few a call of torch's costs several times as much."""
    return [tensor.cpu().numpy() for tensor in tensors]


def tensors(like: Tensor, *arrays: Any) -> list[Tensor]:
    """Back to where the problems are."""
    return [torch.from_numpy(np.asarray(array)).to(like.device) for array in arrays]


def _slack(cost: Any) -> Any:
    """:func:`rounding` of numpy's numbers."""
    return 64 * np.finfo(cost.dtype).eps * (1 + abs(cost))


@np.errstate(all="ignore")
def judge(progress: Progress, iterate: Iterate, direction: Direction, tolerance: float, sweeps: int) -> Progress:
    """Which searches end at this path."""
    now: Any = Progress(*numbers(*progress))
    linear, quadratic, solvable = numbers(direction.linear, direction.quadratic, direction.solvable)
    cost, gap = numbers(iterate.cost, iterate.gap_size)
    decrease = -(linear + quadratic)
    flat = abs(decrease) <= tolerance**2 * (1 + abs(cost))
    # no room to move at any mu: every gradient vanishes or pushes against a bound, whatever the curvature there
    idle = (now.quiet >= _IDLE) | (decrease == 0)
    # a little damping leaves nothing to gain but rounding, on the wrong side of zero: no search would accept that
    idle = idle | ((linear >= 0) & (linear <= _slack(cost)) & (now.mu <= _MILD))
    # what is predicted under a large mu says little, but a rough answer may be one under a small mu
    converged = solvable & (gap <= tolerance) & ((flat & (now.mu <= max(_MU_MIN, 10 * tolerance))) | idle)
    limit, large, low = now.sweeps >= sweeps, now.mu > _MU_MAX, cost < _BOTTOM
    if not (converged | limit | large | low).any():
        return progress
    stuck = np.where(np.isfinite(linear), Outcome.STUCK, Outcome.NOT_SMOOTH)
    outcome = np.where(limit, Outcome.LIMIT, now.outcome)
    outcome = np.where(large, stuck, outcome)
    outcome = np.where(low, Outcome.UNBOUNDED, outcome)
    outcome = np.where(converged, Outcome.CONVERGED, outcome)
    outcome = np.where(now.outcome == Outcome.RUNNING, outcome, now.outcome)
    return progress._replace(outcome=tensors(progress.outcome, outcome)[0])


@np.errstate(all="ignore")
def record(progress: Progress, before: Tensor, iterate: Iterate, direction: Direction, step: Tensor) -> Progress:
    """Count accepted steps and move mu: up on failure, down to zero on success."""
    now: Any = Progress(*numbers(*progress))
    linear, quadratic, old, cost, taken = numbers(direction.linear, direction.quadratic, before, iterate.cost, step)
    moved, running, mu, restart = taken > 0, now.outcome == Outcome.RUNNING, now.mu, now.restart
    if (mu > 0).any() or not (moved | ~running).all():
        up = np.maximum(_UP * mu, np.maximum(restart, _MU_MIN))
        down = np.where(taken >= _LONG, mu / _DOWN, np.where(taken >= _SHORT, mu, _DOWN * mu))
        down = np.where(down < _MU_MIN, np.zeros_like(mu), down)
        restart = np.where(moved & (mu > 0), mu / _DOWN, restart)
        mu = np.where(running, np.where(moved, down, up), mu)
    slack = _slack(cost)
    small = (abs(old - cost) <= slack) & (-(linear + quadratic) <= 1e3 * slack)
    # a sweep or search that failed on the way says nothing about progress
    quiet = np.where(moved, (now.quiet + 1) * small, now.quiet)
    counts = quiet, now.iterations + (moved & running), now.sweeps + running
    mu, restart, quiet, iterations, tried = tensors(progress.mu, mu, restart, *counts)
    return Progress(progress.row, mu, restart, quiet, iterations, tried, progress.outcome)
