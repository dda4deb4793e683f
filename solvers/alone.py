"""One problem of a batch as a problem of its own, and answers put together: for solvers that work one by one.

Notation: a row is a problem's number in the flattened batch; ``batch`` is the batch shape.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.errors import NonFiniteError
from ocnopt.ocp import Function
from ocnopt.paths import Widened, rollout, rows_stand_alone
from ocnopt.problem_checks import FUNCTIONS
from ocnopt.solvers.audit import audit
from ocnopt.solvers.endings import Stopwatch, stopped
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import Stage, StagedOCP


class Attempt(NamedTuple):
    """What a solver found for one problem: states ``(N + 1, n)``, controls ``(N, m)``, in lists where sizes vary.

    Numbers are torch's or numpy's.
    """

    states: Any
    controls: Any
    costates: Any
    parameters: Any
    cost: float
    converged: bool
    iterations: int
    status: str
    violation: float
    wall_time: float
    history: Mapping[str, Sequence[float]]
    multipliers: Mapping[str, Any] | None = None


def each_alone(
    problem: StagedOCP, guess: Guess, solve_one: Callable[[StagedOCP, Guess], Attempt], stopwatch: Stopwatch
) -> Result:
    """Solve the problems of a batch one after another, so that one that fails harms no other.

    Raises:
        NonFiniteError: a single problem has no finite path to start from.
    """
    if not problem.batch_shape:
        return gathered(problem, [solve_one(problem, guess)])
    whole = not _alike(problem)

    def attempt(row: int) -> Attempt:
        single, start = _row_of(problem, row, whole), _guess_of(guess, row)
        try:
            return solve_one(single, start)
        except NonFiniteError as error:
            return _lost(single, start, f"given up: {error}")

    return in_turn(problem, guess, attempt, stopwatch)


def one_for_all(problem: StagedOCP, guess: Guess) -> tuple[StagedOCP, Guess] | None:
    """A single problem and its guess, such that what is built for it serves all of a batch; None where nothing does."""
    if not problem.batch_shape:
        return problem, guess
    alike = _alike(problem) and not problem.bounds_differ
    return (_row_of(problem, 0, False), _guess_of(guess, 0)) if alike else None


def _alike(problem: StagedOCP) -> bool:
    """Whether no function captures anything of one problem alone, data included: their tensors stay as they are."""
    return rows_stand_alone(Widened(problem.altered(data=())))


def in_turn(problem: StagedOCP, guess: Guess, attempt: Callable[[int], Attempt], stopwatch: Stopwatch) -> Result:
    """The answers for all rows; once it is time to stop, what has not begun stays where it would have."""
    attempts: list[Attempt] = []
    for row in range(torch.Size(problem.batch_shape).numel()):
        reason = stopwatch.reason
        if reason is not None:
            attempts += _not_started(problem, guess, reason)[row:]
            break
        attempts.append(attempt(row))
    return gathered(problem, attempts)


def _not_started(problem: StagedOCP, guess: Guess, outcome: int) -> list[Attempt]:
    """The starts of all problems as answers."""
    why, advice = stopped(outcome)
    with torch.no_grad():
        states = guess.states
        if states is None:
            states = rollout(problem, guess.controls, problem.initial_state, guess.parameters).states
        found = audit(problem, states, guess.controls, guess.parameters)

    whole, status = replace(guess, states=states), f"not started: {why}; {advice}"
    numbers = zip(found.cost.reshape(-1).tolist(), found.violation.reshape(-1).tolist(), strict=True)
    return [_stays(_guess_of(whole, row), *both, status) for row, both in enumerate(numbers)]


def _lost(problem: StagedOCP, guess: Guess, status: str) -> Attempt:
    """The answer for a problem whose first path is not finite: its start, without a cost."""
    nodes = [problem.initial_state, *(problem.initial_state.new_full((n,), torch.nan) for n in problem.state_sizes[1:])]
    return _stays(replace(guess, states=nodes), torch.nan, torch.inf, status)


def _stays(start: Guess, cost: float, violation: float, status: str) -> Attempt:
    """A start with states as the answer."""
    return Attempt(
        states=start.states,
        controls=start.controls,
        costates=[torch.full_like(x, torch.nan) for x in (() if start.states is None else start.states)],
        parameters=start.parameters,
        cost=cost,
        converged=False,
        iterations=0,
        status=status,
        violation=violation,
        wall_time=0.0,
        history={"cost": [cost]},
    )


def _flat(value: Tensor) -> Tensor:
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])


def _guess_of(guess: Guess, row: int) -> Guess:
    states = None if guess.states is None else [_flat(x)[row] for x in guess.states]
    return Guess([_flat(u)[row] for u in guess.controls], _flat(guess.parameters)[row], states)


def _row_of(problem: StagedOCP, row: int, whole: bool) -> StagedOCP:
    """The problem of one row; functions that hold data of each problem are evaluated for the whole batch."""
    batch, x0 = problem.batch_shape, problem.initial_state
    pick = _Pick(batch, tuple(int(i) for i in torch.unravel_index(torch.tensor(row), batch)))

    def narrowed(record: Any, names: Mapping[str, bool]) -> Any:
        single = copy.copy(record)
        object.__setattr__(single, "initial_state", _flat(x0)[row])
        if whole:
            # what is lowered of such a problem is lowered anew for each solve: data are constants
            object.__setattr__(single, "data", ())
        for name, timed in names.items() if whole else ():
            if getattr(record, name) is not None:
                object.__setattr__(single, name, pick.of(getattr(record, name), timed=timed))
        return single

    ends = {"terminal_cost": False, "terminal_constraint": False, "path_constraint": True}
    single: StagedOCP = narrowed(problem, ends)
    if whole:
        stages = {id(group.stage): pick.stage(group.stage) for group in problem.groups}
        groups = tuple(replace(group, stage=stages[id(group.stage)]) for group in problem.groups)
        single = single.altered(groups=groups)
    single = single.for_rows(row)
    if problem.origin is not None:
        origin, box = narrowed(problem.origin.problem, dict.fromkeys(FUNCTIONS, True)), single.parameter_bounds
        object.__setattr__(origin, "control_bounds", single.control_bounds[0])
        single = single.altered(origin=replace(problem.origin, problem=origin, parameter_bounds=box))
    return single


@dataclass(frozen=True)
class _Pick:
    """Evaluates functions of a batch at points of one problem: every row gets them, one is read off."""

    batch: tuple[int, ...]
    place: tuple[int, ...]

    def spread(self, v: Tensor) -> Tensor:
        """``(*extra, size)`` as ``(*extra, *batch, size)``."""
        return v[(..., *(None,) * len(self.batch), slice(None))].expand(*v.shape[:-1], *self.batch, v.shape[-1])

    def number(self, k: Any) -> Any:
        """A time or a step number, which broadcasts against x[..., 0]."""
        return k[(..., *(None,) * len(self.batch))] if isinstance(k, Tensor) and k.ndim else k

    def read(self, value: Any, x: Tensor) -> Tensor:
        """The row's own out of what a function of x returned: a vector, or a cost, which may have fewer axes."""
        value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if value.ndim == x.ndim + len(self.batch):
            return value[(..., *self.place, slice(None))]
        return value.expand(*x.shape[:-1], *self.batch)[(..., *self.place)]

    def of(self, function: Function, *, timed: bool) -> Function:
        """A function ([t,] x[, u][, p]) of the batch for one problem."""

        def one(*given: Any) -> Tensor:
            front = [self.number(given[0])] if timed else []
            return self.read(function(*front, *map(self.spread, given[timed:])), given[timed])

        return one

    def stage(self, stage: Stage) -> Stage:
        """A stage of the batch for one problem."""
        joint = stage.joint

        def both(k: Any, x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            x_next, cost = joint(self.number(k), self.spread(x), *map(self.spread, given))  # type: ignore[misc]
            return self.read(x_next, x), self.read(cost, x)

        dynamics, cost = (f and self.of(f, timed=True) for f in (stage.dynamics, stage.cost))
        return Stage(dynamics, cost, stage.control_dim, both if joint else None)


def gathered(problem: StagedOCP, attempts: Sequence[Attempt]) -> Result:
    """The answers, one for each problem, in the shapes of a Result."""
    batch, like = problem.batch_shape, problem.initial_state

    def together(values: Sequence[Any], dtype: torch.dtype = problem.dtype) -> Tensor:
        stacked = torch.stack([torch.as_tensor(value, dtype=dtype, device=like.device) for value in values])
        return stacked.reshape((*batch, *stacked.shape[1:]))

    def multipliers(name: str, known: Tensor) -> Tensor:
        rows = [torch.full_like(known, torch.nan) if a.multipliers is None else a.multipliers[name] for a in attempts]
        return together(rows) if name == "terminal_constraint" else together(rows).movedim(-2, 0)

    def path(name: str) -> list[Tensor]:
        return [together(nodes) for nodes in zip(*(getattr(a, name) for a in attempts), strict=True)]

    longest = max(len(a.history["cost"]) for a in attempts)

    def filled(rows: Sequence[float]) -> list[float]:
        return [*rows, *[rows[-1]] * (longest - len(rows))]

    keys = dict.fromkeys(key for a in attempts for key in a.history)
    known: Mapping[str, Any] = next((a.multipliers for a in attempts if a.multipliers), {})
    history = {key: together([filled(a.history.get(key, [torch.nan])) for a in attempts]) for key in keys}
    return Result(
        states=path("states"),
        controls=path("controls"),
        parameters=together([a.parameters for a in attempts]),
        cost=together([a.cost for a in attempts]),
        converged=together([a.converged for a in attempts], torch.bool),
        iterations=together([a.iterations for a in attempts], torch.int64),
        status=[a.status for a in attempts] if batch else attempts[0].status,
        constraint_violation=together([a.violation for a in attempts]),
        wall_time=sum(a.wall_time for a in attempts),
        build_time=0.0,
        history={key: value.movedim(-1, 0) for key, value in history.items()},
        costates=path("costates"),
        multipliers={name: multipliers(name, torch.as_tensor(value)) for name, value in known.items()} or None,
    )
