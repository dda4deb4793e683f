r"""The search of a descent method: which step to take along a direction, how to regularise the next, when to stop.

Every problem of a batch has its own step size, regularisation and end. What belongs to a problem is a row of every
tensor, time in front where there is time: states ``(N + 1, B, n)``; without a batch the axis B is missing. Single
numbers of each problem, costs ``(B,)``, are numpy's, on the host: the rules below read the same for one and for many.

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
from ocnopt.solvers.kernels import Kernel, Merit, Numbers

_MU_FIRST, _MU_MIN, _MU_MAX = 1e-4, 1e-6, 1e12  # the first after zero, the smallest but zero, the largest
# mu grows by _UP when nothing was accepted, falls by _DOWN after a step >= _LONG, rises by _DOWN after one < _SHORT:
# a fifth to a quarter fewer sweeps than the schedule of Tassa et al. 2012 on pendulum and cartpole swing-ups.
_UP, _DOWN, _LONG, _SHORT = 10.0, 3.0, 0.5, 0.1
# Gauss-Newton converges linearly and may creep on in the last digits: so many steps below rounding are the end too.
_IDLE = 5
_MILD = 1e-2  # damping up to this hides no gain that is worth a step
# All step sizes are tried in one rollout where a batch is so small that only calls cost time.
_SMALL = 64
_SHARE = 0.25  # of the first-order gain, which a step must reach; a full Newton step gains half
_ALPHAS = tuple(0.5**i for i in range(14))  # step sizes, from the full one down
_BOTTOM = -1e20  # a cost below has no lower bound

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

    def direction(self, path: Path, mu: Numbers, *, exact: bool) -> Direction:
        """See :class:`Kernel`; a path swept again, with another mu, is not expanded again."""
        mu = torch.as_tensor(mu, dtype=path.cost.dtype, device=path.cost.device)
        states, controls, was_exact, *models = self._expanded
        if states is not path.states or controls is not path.controls or (exact and not was_exact):
            wide = self._of(path.rows)
            models = [expand_path(wide, path, exact=exact), expand_terminal(wide, path.states[-1])]
            self._expanded = path.states, path.controls, exact, *models
        steps, terminal = models
        return sweep_path(self._of(path.rows), path, steps if exact else steps._replace(curvature=None), terminal, mu)

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """See :class:`Kernel`."""
        a, start = alphas.reshape((-1, *(1,) * path.states[0].ndim)), path.states[0]
        start = start.expand(len(alphas), *start.shape)
        if self.wide.q:
            start = torch.cat([start[..., : -self.wide.q], start[..., -self.wide.q :] + a * direction.dp], dim=-1)
        wide = self._of(path.rows)
        law = FeedbackLaw(path.states, path.controls, direction.k, direction.K, a, wide.control_bounds)
        gaps = None if path.gaps is None else (1 - a) * path.gaps[:, None]
        return walk(wide, law, start, gaps)

    def search(
        self, path: Path, direction: Direction, merit: Merit, active: Numbers, alphas: Sequence[float]
    ) -> tuple[Path, Numbers] | None:
        """See :class:`Kernel`."""
        return None

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """See :class:`Kernel`."""
        return (alphas,) if lanes <= _SMALL else (alphas[:1], alphas[1:])

    def _of(self, rows: Tensor | None) -> Widened:
        """The problem as it is for some rows of its batch."""
        whole = self.wide.problem
        some = whole if rows is None else whole.for_rows(rows.to(whole.device))
        return self.wide if some is whole else Widened(some)


class Iterate(NamedTuple):
    """A path, its cost, the sum and the largest of its |gaps|, and the weight of the sum in the merit of the search."""

    path: Path
    cost: Numbers
    gap_sum: Numbers
    gap_size: Numbers
    weight: Numbers


def begin(path: Path) -> Iterate:
    """A path before the first step."""
    cost = numbers(path.cost)
    zero = np.zeros_like(cost)[()]
    if path.gaps is None:
        return Iterate(path, cost, zero, zero, zero)
    size = path.gaps.abs()
    return Iterate(path, cost, numbers(size.sum(-1).sum(0)), numbers(size.amax(-1).amax(0)), zero)


def closed(iterate: Iterate) -> Iterate:
    """Without gaps where none is open."""
    path, open_ = iterate.path, anywhere(iterate.gap_size > 0)
    return iterate if path.gaps is None or open_ else iterate._replace(path=path._replace(gaps=None))


def moved_to(iterate: Iterate, path: Path, step: Numbers, weight: Numbers) -> Iterate:
    """The path that a step leads to: of every gap, 1 - step is left."""
    cost, gaps = numbers(path.cost), iterate.path.gaps
    if gaps is None:
        return iterate._replace(path=path, cost=cost)
    left = 1 - step
    gaps = torch.as_tensor(left, dtype=gaps.dtype, device=gaps.device)[..., None] * gaps
    weight = where(step > 0, weight, iterate.weight)
    return Iterate(path._replace(gaps=gaps), cost, left * iterate.gap_sum, left * iterate.gap_size, weight)


class Aim(NamedTuple):
    """A direction, with the predicted change of cost and whether there is one.

    ``convex`` says which models are, whatever direction then takes their place; all by "gauss_newton".
    """

    direction: Direction
    linear: Numbers
    quadratic: Numbers
    solvable: Numbers
    convex: Numbers


def aim_along(direction: Direction) -> Aim:
    """A direction with its numbers."""
    solvable = numbers(direction.solvable)
    return Aim(direction, numbers(direction.linear), numbers(direction.quadratic), solvable, solvable)


class Outcome:
    """How the search for one problem ended, if it has."""

    RUNNING, CONVERGED, NOT_FINITE, STUCK, LIMIT, NOT_SMOOTH, UNBOUNDED, LATE, INTERRUPTED, UNMET, ROUNDS = range(11)
    SADDLE = 11

    @staticmethod
    def solved(outcome: Any) -> Any:
        """Which searches ended where no first-order step descends."""
        return (outcome == Outcome.CONVERGED) | (outcome == Outcome.SADDLE)


class Progress(NamedTuple):
    """The search for each problem: its place in the batch, regularisation mu and where mu jumps to after a failure.

    ``quiet`` counts accepted steps in a row that changed nothing, ``iterations`` accepted steps, ``sweeps`` all.
    """

    row: Numbers
    mu: Numbers
    restart: Numbers
    quiet: Numbers
    iterations: Numbers
    sweeps: Numbers
    outcome: Numbers

    @property
    def running(self) -> Numbers:
        """Problems that still move."""
        return self.outcome == Outcome.RUNNING


Record = TypeVar("Record", Iterate, Progress, Aim, Path, Direction)
_TIMED = ("states", "controls", "gaps", "k", "K", "costates")


def each(function: Callable[..., Any], *records: Record) -> Record:
    """Apply ``function(axis, *values)`` to every field, the problems of the batch standing along that axis."""
    made: dict[str, Any] = {}
    for name, values in zip(records[0]._fields, zip(*records, strict=True), strict=True):
        if isinstance(values[0], tuple):
            made[name] = each(function, *values)
        else:
            made[name] = None if values[0] is None else function(int(name in _TIMED), *values)
    return records[0]._replace(**made)


def numbers(values: Tensor) -> Numbers:
    """One number of each problem: over so few a call of torch's costs several times as much as numpy's."""
    return values.cpu().numpy()[()]


def where(mask: Numbers, value: Numbers, other: Numbers) -> Numbers:
    """np.where, many times as quick for a single problem."""
    return np.where(mask, value, other) if isinstance(mask, np.ndarray) else value if mask else other


def anywhere(mask: Numbers) -> bool:
    """Whether it holds for any problem."""
    return bool(mask.any() if isinstance(mask, np.ndarray) else mask)


def rounding(cost: Numbers) -> Numbers:
    """Costs closer than this cannot be told apart in floating point."""
    return 64 * np.finfo(cost.dtype).eps * (1 + abs(cost))


def choose(mask: Tensor, axis: int, value: Tensor, other: Tensor) -> Tensor:
    """The value where the mask of the problems holds, else the other."""
    shape = ((1,) * axis) + mask.shape + (1,) * (value.ndim - axis - mask.ndim)
    return torch.where(mask.reshape(shape).to(value.device), value, other)


def chosen(mask: Numbers, record: Record, other: Record) -> Record:
    """The problems of one record where the mask holds, else of the other."""
    if not isinstance(mask, np.ndarray):
        return record if mask else other
    places = torch.from_numpy(mask)
    return each(lambda i, *v: choose(places, i, *v) if isinstance(v[0], Tensor) else np.where(mask, *v), record, other)


def find_direction(kernel: Kernel, iterate: Iterate, mu: Numbers, curvature: Curvature) -> Aim:
    """The direction at a path; for a non-convex exact model, where allowed, the Gauss-Newton direction instead."""
    aim = aim_along(kernel.direction(iterate.path, mu, exact=curvature != "gauss_newton"))
    if curvature == "gauss_newton":
        return aim._replace(convex=np.ones_like(aim.convex)[()])
    # An infeasible path's costates belong to no trajectory: its exact curvature misleads more than it helps.
    keep = aim.solvable if curvature == "auto" else aim.solvable | (iterate.gap_size == 0)
    if not anywhere(~keep):
        return aim
    # the torch kernel has expanded the whole path already, and would expand a part of it anew
    share, rows = 0.25 if kernel.name == "torch" else 0.9, np.atleast_1d(~keep).nonzero()[0]
    if kernel.apart and np.ndim(keep) == 1 and len(rows) <= share * keep.size:
        some = aim_along(kernel.direction(pick_rows(iterate.path, rows), mu[rows], exact=False))
        return put_rows(aim, rows, some)._replace(convex=aim.convex)
    other = aim_along(kernel.direction(iterate.path, mu, exact=False))
    return chosen(keep, aim, other)._replace(convex=aim.convex)


def ending(
    kernel: Kernel, iterate: Iterate, progress: Progress, aim: Aim, curvature: Curvature
) -> tuple[Progress, Aim]:
    """Ends as they are without regularisation: a minimum with the gains that it has then, or a saddle.

    Eliminating controls one by one factorises the cost's Hessian: it has a negative eigenvalue where some Q_uu has.
    """
    unsure = (progress.outcome == Outcome.CONVERGED) & ((progress.mu > 0) | ~aim.convex)
    if not anywhere(unsure):
        return progress, aim
    free = find_direction(kernel, iterate, np.zeros_like(progress.mu)[()], curvature)
    aim = chosen(unsure & (progress.mu > 0) & free.solvable, free, aim)
    unsure = unsure & ~free.convex
    if anywhere(unsure):
        # a direction along which nothing changes, or only by rounding, makes no saddle
        little = np.full_like(progress.mu, _MU_MIN)[()]
        flat = numbers(kernel.direction(iterate.path, little, exact=True).solvable)
        progress = progress._replace(outcome=where(unsure & ~flat, Outcome.SADDLE, progress.outcome))
    return progress, aim


def line_search(kernel: Kernel, iterate: Iterate, aim: Aim, active: Numbers) -> tuple[Iterate, Numbers]:
    """Try the full step and shorter ones; each problem takes the longest that decreases its merit enough.

    Returns:
        The new iterate and the step taken, zero where none was.
    """
    weight, merit = weigh(iterate, aim)
    searched = kernel.search(iterate.path, aim.direction, merit, active, _ALPHAS)
    if searched is not None:
        path, step = searched
        return closed(moved_to(iterate, path, step, weight)), step
    step = np.zeros_like(iterate.cost)[()]
    for sizes in kernel.ladder(np.size(active), _ALPHAS):
        open_ = active & (step == 0)
        if not anywhere(open_):
            break
        if kernel.apart and np.ndim(open_) == 1 and 2 * open_.sum() <= open_.size:
            rows = open_.nonzero()[0]
            moved, found = search_some(kernel, pick_rows(iterate, rows), pick_rows(aim, rows), sizes)
            iterate, step[rows] = put_rows(iterate, rows, moved), found
        else:
            iterate, found = search_some(kernel, iterate, aim, sizes, open_)
            step = where(open_, found, step)
    return closed(iterate), step


def pick_rows(record: Record, rows: Numbers) -> Record:
    """Some problems of a batch."""
    places = torch.from_numpy(rows)
    return each(lambda axis, v: v.index_select(axis, places.to(v.device)) if isinstance(v, Tensor) else v[rows], record)


def put_rows(record: Record, rows: Numbers, some: Record) -> Record:
    """A batch with some of its problems replaced."""
    places = torch.from_numpy(rows)

    def put(axis: int, value: Any, new: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_copy(axis, places.to(value.device), new)
        changed = value.copy()
        changed[rows] = new
        return changed

    return each(put, record, some)


def weigh(iterate: Iterate, aim: Aim) -> tuple[Numbers, Merit]:
    """The weight of the gaps and what a step must gain."""
    infeasible, weight, slack = iterate.gap_sum, iterate.weight, rounding(iterate.cost)
    if iterate.path.gaps is None:
        slope = -aim.linear
        return weight, Merit(infeasible, slope, _SHARE * slope, slack)
    # twice the smallest weight for which the step descends on cost + weight * |gaps| (Nocedal and Wright, 18.36)
    with np.errstate(all="ignore"):
        needed = 2 * (aim.linear + np.maximum(aim.quadratic, 0)) / infeasible
    weight = where(infeasible > 0, np.maximum(weight, needed), weight)
    penalty = weight * infeasible
    slope = penalty - aim.linear
    return weight, Merit(penalty, slope, _SHARE * slope, slack)


def search_some(
    kernel: Kernel, iterate: Iterate, aim: Aim, sizes: Sequence[float], allowed: Numbers = True
) -> tuple[Iterate, Numbers]:
    """Roll the feedback law out for every step size and take the longest that decreases the merit enough."""
    path = iterate.path
    alphas = torch.tensor(sizes, dtype=path.cost.dtype, device=path.cost.device)
    trial, (weight, merit) = kernel.roll_out(path, aim.direction, alphas), weigh(iterate, aim)
    alpha = numbers(alphas).reshape((-1, *(1,) * path.cost.ndim))
    cost, finite = numbers(trial.cost), numbers(torch.isfinite(trial.states).all(-1).all(0))
    gain = iterate.cost - cost + alpha * merit.penalty
    # a step predicted to gain less than rounding is taken if it loses no more
    enough = gain >= np.minimum(alpha * merit.least, alpha * merit.slope - merit.slack)
    accepted = enough & (merit.slope >= 0) & np.isfinite(cost) & finite & allowed
    first, found = accepted.argmax(0), accepted.any(0)
    if not found.any():
        return iterate, np.zeros_like(iterate.cost)[()]
    step = where(found, alpha.reshape(-1)[first], np.zeros_like(iterate.cost)[()])
    taken, index = torch.as_tensor(found, device=path.cost.device), torch.as_tensor(first, device=path.cost.device)

    def pick(axis: int, now: Tensor, candidates: Tensor) -> Tensor:
        place = index.reshape((1,) * (axis + 1) + index.shape + (1,) * (now.ndim - axis - index.ndim))
        place = place.expand(*now.shape[:axis], 1, *now.shape[axis:])
        return choose(taken, axis, torch.gather(candidates, axis, place).squeeze(axis), now)

    states, controls, reached = (pick(*each_) for each_ in zip((1, 1, 0), path[:3], trial[:3], strict=True))
    return moved_to(iterate, Path(states, controls, reached, path.gaps, path.rows), step, weight), step


def judge(progress: Progress, iterate: Iterate, aim: Aim, tolerance: float, sweeps: int) -> Progress:
    """Which searches end at this path."""
    now, cost = progress, iterate.cost
    decrease = -(aim.linear + aim.quadratic)
    flat = abs(decrease) <= tolerance**2 * (1 + abs(cost))
    # no room to move at any mu: every gradient vanishes or pushes against a bound, whatever the curvature there
    idle = (now.quiet >= _IDLE) | (decrease == 0)
    # a little damping leaves nothing to gain but rounding, on the wrong side of zero: no search would accept that
    idle |= (aim.linear >= 0) & (aim.linear <= rounding(cost)) & (now.mu <= _MILD)
    # what is predicted under a large mu says little, but a rough answer may be one under a small mu
    flat = flat & (now.mu <= max(_MU_MIN, 10 * tolerance))
    converged = aim.solvable & (iterate.gap_size <= tolerance) & (flat | idle)
    limit, large, low = now.sweeps >= sweeps, now.mu > _MU_MAX, cost < _BOTTOM
    if not anywhere(converged | limit | large | low):
        return progress
    stuck = where(np.isfinite(aim.linear), Outcome.STUCK, Outcome.NOT_SMOOTH)
    outcome = where(limit, Outcome.LIMIT, now.outcome)
    outcome = where(large, stuck, outcome)
    outcome = where(low, Outcome.UNBOUNDED, outcome)
    outcome = where(converged, Outcome.CONVERGED, outcome)
    return progress._replace(outcome=where(now.running, outcome, now.outcome))


def record(progress: Progress, before: Numbers, iterate: Iterate, aim: Aim, step: Numbers) -> Progress:
    """Count accepted steps and move mu: up on failure, down to zero on success."""
    now, cost, moved, running = progress, iterate.cost, step > 0, progress.running
    mu, restart = now.mu, now.restart
    if anywhere((mu > 0) | (running & ~moved)):
        up = np.maximum(_UP * mu, np.maximum(restart, _MU_FIRST))
        down = where(step >= _LONG, mu / _DOWN, where(step >= _SHORT, mu, _DOWN * mu))
        down = where(down < _MU_MIN, np.zeros_like(mu), down)
        restart = where(moved & (mu > 0), mu / _DOWN, restart)
        mu = where(running, where(moved, down, up), mu)
    slack = rounding(cost)
    small = (abs(before - cost) <= slack) & (-(aim.linear + aim.quadratic) <= 1e3 * slack)
    # a sweep or search that failed on the way says nothing about progress
    quiet = where(moved, (now.quiet + 1) * small, now.quiet)
    return Progress(now.row, mu, restart, quiet, now.iterations + (moved & running), now.sweeps + running, now.outcome)
