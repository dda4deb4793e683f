"""From a discrete problem to the lowered steps of a nonlinear program.

Multiple shooting takes the discrete problem's own steps, so its optimum is that of every other solver of the same
problem. Collocation takes the continuous problem behind it: on each step the state is a polynomial that satisfies the
differential equation at Legendre points, the control is constant, and the same points integrate the running cost.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import casadi
import torch
from torch import Tensor

from ocnopt.captured import substituted, which_of_each
from ocnopt.checks import clipped
from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import Tableau
from ocnopt.ocp import Function, Lifted
from ocnopt.paths import looked_up
from ocnopt.solvers.direct.nlp import kind_of
from ocnopt.solvers.direct.path_program import Run
from ocnopt.solvers.lowering.lowering import Lowering, lower, scattered
from ocnopt.solvers.solution import Guess
from ocnopt.staged import Group, Stage, StagedOCP


class Part(NamedTuple):
    """Steps start..stop-1 and what serves them, lowered for the whole batch."""

    lowering: Lowering
    start: int
    stop: int


class Lowered(NamedTuple):
    """A discrete problem in CasADi: ``rows`` makes the functions of one problem of the batch."""

    parts: list[Part]
    end: Lowering
    inner: Callable[[casadi.Function], casadi.Function]

    def rows(self, row: int | None) -> tuple[list[Run], casadi.Function]:
        """Return the steps and the end of one problem."""
        runs = [Run(self.inner(part.lowering.function(row)), part.start, part.stop) for part in self.parts]
        return runs, _one_given(self.end.function(row), 3)

    def require_same(self, problem: StagedOCP) -> None:
        """Compare all functions with what they were.

        Raises:
            ProblemError: something that they capture has changed, and is not among the data.
        """
        for lowering in (*(part.lowering for part in self.parts), self.end):
            lowering.require_same(_given(problem))


def lower_shooting(problem: StagedOCP, guess: Guess, states: Sequence[Tensor]) -> Lowered:
    """Lower the steps of the discrete problem itself.

    Args:
        problem: the discrete problem.
        guess: controls and parameters near which the functions are checked against torch.
        states: a path of the right sizes.

    Raises:
        ProblemError: a function cannot be lowered.
    """
    parts: list[Part] = []
    for start, stop, group in _stretches(problem, states):
        arguments = (states[start], guess.controls[start], guess.parameters)
        parts += _lower_stretch(problem, group, start, stop, arguments)
    return Lowered(parts, _lower_end(problem, guess, states), lambda function: _without_inner(_one_given(function, 4)))


def lower_collocation(problem: StagedOCP, guess: Guess, states: Sequence[Tensor], degree: int | None) -> Lowered:
    """Lower the continuous problem behind the discrete one.

    Without a degree the inner points of a step are the stages of the problem's own implicit integrator, and the program
    is that of the discrete problem.

    Raises:
        ProblemError: the problem was discrete from the start, or a function cannot be lowered.
    """
    lifted = problem.origin
    if lifted is None or problem.step_data is not None:
        raise ProblemError(
            "method='collocation' got a problem that is discrete from the start; expected an oc.OCP, or "
            "use method='multiple_shooting'"
        )

    components: dict[str, Function] = {
        "dynamics": lambda k, t, x, u, p, *given: lifted.dynamics(t, x, u, p),
        "running_cost": lambda k, t, x, u, p, *given: lifted.running_cost(t, x, u, p),
        "path_constraint": lambda k, t, x, u, p, *given: problem.path_excess(k, x, u, p),
    }
    k = states[0].new_tensor(1.0)
    span = (lifted.t1 - lifted.t0) / problem.steps
    points = _points(problem, (k, k * span, states[0], guess.controls[0], guess.parameters))
    whole = _tuple_of(problem, components)
    lowering = lower(whole, points, "the problem", problem.batch_shape, components=components)

    def step(function: casadi.Function) -> casadi.Function:
        if degree is None and problem.tableau is not None:
            return _implicit_step(_one_given(function, 5), lifted, problem.steps, problem.tableau)
        return _collocation_step(_one_given(function, 5), lifted, problem.steps, degree or 1)

    return Lowered([Part(lowering, 0, problem.steps)], _lower_end(problem, guess, states), step)


def _stretches(problem: StagedOCP, states: Sequence[Tensor]) -> Iterator[tuple[int, int, Group]]:
    """Runs of steps that share a stage and its sizes."""
    start = 0
    for i, group in enumerate(problem.groups):
        after = problem.groups[i + 1] if i + 1 < len(problem.groups) else None
        same = after is not None and after.stage is group.stage and group.single and after.single
        if not same or states[start].shape != states[group.stop].shape:
            yield start, group.stop, group
            start = group.stop


def _tuple_of(problem: StagedOCP, functions: Mapping[str, Function]) -> Function:
    """One function of (.., u, p, data) that returns what all of them return, so that shared work is traced once."""

    def together(*arguments: Tensor) -> tuple[Any, ...]:
        with _seen(problem, arguments):
            return tuple(function(*arguments) for function in functions.values())

    return together


def _seen(problem: StagedOCP, arguments: Sequence[Tensor]) -> Any:
    """Within it, the functions see the last arguments as the problem's data."""
    given = arguments[len(arguments) - len(problem.data) :]
    pairs = zip(problem.data, given, strict=True)
    return substituted(problem.data, [v if v.ndim == tensor.ndim else v.reshape(tensor.shape) for tensor, v in pairs])


def _given(problem: StagedOCP) -> list[Tensor]:
    """What a step is given besides: a row of ``step_data``, the data.

    What belongs to all problems has axes more, as its own may look like the batch's.
    """
    more = (None,) * len(problem.batch_shape)
    data = [tensor if own else tensor[more] for tensor, own in zip(problem.data, which_of_each(problem), strict=True)]
    return [*([] if problem.step_data is None else [problem.step_data[0]]), *data]


def _lower_stretch(
    problem: StagedOCP, group: Group, start: int, stop: int, arguments: tuple[Tensor, Tensor, Tensor]
) -> list[Part]:
    """Lower steps of one stage: once for all if k may be an argument, else step by step."""
    stage, batch = group.stage, problem.batch_shape
    name = f"stage {start}" if group.single else "the stage"

    def at(k: Any, x: Tensor, u: Tensor, p: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with _seen(problem, given):
            x_next, cost = problem.advance(stage, k, x, u, p, None if problem.step_data is None else given[0])
            return x_next, cost, problem.path_excess(k, x, u, p)

    def ahead(k: Tensor, x: Tensor, u: Tensor, p: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return looked_up(lambda *first: at(*first, *given), k, x, u, p)

    def counted(k: Tensor, x: Tensor, u: Tensor, p: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return at(int(k), x, u, p, *given)

    if stage.joint is not None:
        # A transcribed step computes its time from k.
        points = _points(problem, (arguments[0].new_tensor(start), *arguments), _spread(start, stop))
        return [Part(lower(at, points, name, batch, components=_components(problem, stage)), start, stop)]
    if not group.single:
        k = torch.tensor(start, device=problem.device)
        points = _points(problem, (k, *arguments), _spread(start, stop))
        return [Part(lower(ahead, points, name, batch, components=_components(problem, stage)), start, stop)]
    if stop - start > 1:
        try:
            every = [float(k) for k in range(start, stop)]
            points = _points(problem, (torch.tensor(start), *arguments), every)
            lowering = lower(ahead, points, name, batch, reference=counted)
            lowering.function(0 if batch else None)
            return [Part(lowering, start, stop)]
        except ProblemError:
            # The stage does more with its number than a tensor can.
            return [p for k in range(start, stop) for p in _lower_stretch(problem, group, k, k + 1, arguments)]
    points = _points(problem, (torch.tensor(start), *arguments), [float(start)])
    fixed = lambda k, *rest: at(start, *rest)  # noqa: E731
    return [Part(lower(fixed, points, name, batch, components=_components(problem, stage, start)), start, stop)]


def _spread(start: int, stop: int) -> list[float]:
    """A few steps between the first and the last."""
    spread: list[float] = torch.linspace(start, stop - 1, 4).round().tolist()
    return spread


def _components(problem: StagedOCP, stage: Stage, step: int | None = None) -> dict[str, Function]:
    """The user's functions behind a stage, by name and all of (k, x, u, p)."""
    lifted = problem.origin
    if lifted is not None:
        h = (lifted.t1 - lifted.t0) / problem.steps
        return {
            "dynamics": lambda k, x, u, p, *given: lifted.dynamics(lifted.t0 + h * k, x, u, p),
            "running_cost": lambda k, x, u, p, *given: lifted.running_cost(lifted.t0 + h * k, x, u, p),
            "path_constraint": lambda k, x, u, p, *given: problem.path_excess(k, x, u, p),
        }
    extra = problem.parameters is not None
    place = "the stage's" if step is None else f"stage {step}'s"

    def own(function: Function) -> Function:
        return lambda k, x, u, p, *given: function(k if step is None else step, x, u, *((p,) if extra else ()))

    named = {"dynamics": stage.dynamics, "cost": stage.cost, "path_constraint": problem.path_constraint}
    return {f"{place} {name}": own(function) for name, function in named.items() if function is not None}


def _lower_end(problem: StagedOCP, guess: Guess, states: Sequence[Tensor]) -> Lowering:
    steps: Any = problem.steps
    if not problem.groups[-1].single and problem.origin is None:
        steps = torch.full((1,) * len(problem.batch_shape), steps, device=problem.device)

    tabled = problem.step_data is not None
    components: dict[str, Function] = {
        "terminal_cost": lambda x, u, p, *given: problem.terminal(x, p, given[0] if tabled else None),
        "terminal_constraint": lambda x, u, p, *given: problem.end_error(x, p),
        "path_constraint": lambda x, u, p, *given: problem.path_excess(steps, x, u, p),
    }
    points = _points(problem, (states[-1], guess.controls[-1], guess.parameters))
    return lower(_tuple_of(problem, components), points, "the end", problem.batch_shape, components=components)


def _points(problem: StagedOCP, arguments: tuple[Tensor, ...], steps: Sequence[float] = ()) -> list[Sequence[Tensor]]:
    """Points around (.., u, p) within the bounds, and data; ``steps`` are the values of a leading k."""
    points: list[Sequence[Tensor]] = []
    given_now = [v.detach().clone() for v in _given(problem)]
    for i, point in enumerate(scattered([*arguments, *given_now], count=max(3, len(steps) - 1))):
        (*front, u, p), given = point[: len(arguments)], point[len(arguments) :]
        bounds = next((b for b in problem.step_bounds if b is not None and b[0].shape[-1:] == u.shape[-1:]), None)
        if steps:
            front[0] = torch.full_like(arguments[0], steps[i % len(steps)])
        points.append([*front, clipped(u, bounds), clipped(p, problem.parameter_bounds), *given])
    return points


def _without_inner(function: casadi.Function) -> casadi.Function:
    """(k, x, u, p, d) -> (f, l, c) as a step without inner points."""
    kind = kind_of(function)
    k, x, u, p, d = (kind.sym(name, function.numel_in(i)) for i, name in enumerate("kxupd"))
    f, cost, c = function(k, x, u, p, d)
    return casadi.Function("step", [k, x, kind.sym("s", 0), u, p, d], [f, kind(0, 1), cost, c])


def _one_given(function: casadi.Function, own: int) -> casadi.Function:
    """The function with all arguments behind its ``own`` ones as one column."""
    kind = kind_of(function)
    symbols = [kind.sym(f"a{i}", function.numel_in(i)) for i in range(own)]
    sizes = [int(function.numel_in(i)) for i in range(own, function.n_in())]
    d = kind.sym("d", sum(sizes))
    parts = casadi.vertsplit(d, [0, *itertools.accumulate(sizes)]) if sizes else []
    return casadi.Function("given", [*symbols, d], function.call([*symbols, *parts]))


def _collocation_step(function: casadi.Function, lifted: Lifted, steps: int, degree: int) -> casadi.Function:
    """A step whose inner points s = (X_1, .., X_d) satisfy the differential equation at Legendre points.

    Source: Betts, Practical Methods for Optimal Control, 2010, section 4.5 (collocation at Gauss points).
    """
    tau = casadi.collocation_points(degree, "legendre")
    slopes, ends, weights = casadi.collocation_coeff(tau)
    h = (lifted.t1 - lifted.t0) / steps
    k, x, inner, u, p, d = _step_symbols(function, degree)
    nodes = casadi.horzcat(x, casadi.reshape(inner, -1, degree))
    residual, cost = [], 0
    for i in range(degree):
        rate, running, _ = function(k, lifted.t0 + h * (k + tau[i]), nodes[:, i + 1], u, p, d)
        residual.append(nodes @ slopes[:, i] - h * rate)
        cost = cost + h * weights[i] * running
    path = function(k, lifted.t0 + h * k, x, u, p, d)[2]
    return casadi.Function("step", [k, x, inner, u, p, d], [nodes @ ends, casadi.vertcat(*residual), cost, path])


def _step_symbols(function: casadi.Function, points: int) -> list[Any]:
    """k, x, s, u, p, d of a step with that many inner points, for rates (k, t, x, u, p, d) -> .."""
    kind, n = kind_of(function), int(function.numel_in(2))
    sizes = (1, n, n * points, *(int(function.numel_in(i)) for i in (3, 4, 5)))
    return [kind.sym(name, size) for name, size in zip("kxsupd", sizes, strict=True)]


def _implicit_step(function: casadi.Function, lifted: Lifted, steps: int, tableau: Tableau) -> casadi.Function:
    """A step whose inner points are the stages y_i = x + h sum_j a_ij F(y_j) of an implicit Runge-Kutta method."""
    h = (lifted.t1 - lifted.t0) / steps
    k, x, inner, u, p, d = _step_symbols(function, len(tableau.c))
    points = casadi.reshape(inner, -1, len(tableau.c))
    found = [function(k, lifted.t0 + h * (k + c), points[:, i], u, p, d) for i, c in enumerate(tableau.c)]
    rates = casadi.horzcat(*(rate for rate, _, _ in found))
    residual = points - casadi.repmat(x, 1, len(tableau.c)) - h * rates @ casadi.DM(tableau.a).T
    end, cost = x + h * rates @ casadi.DM(tableau.b), sum(h * b * found[i][1] for i, b in enumerate(tableau.b))
    path = function(k, lifted.t0 + h * k, x, u, p, d)[2]
    return casadi.Function("step", [k, x, inner, u, p, d], [end, casadi.vec(residual), cost, path])
