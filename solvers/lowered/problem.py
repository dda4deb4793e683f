"""Which problems can be lowered, and the one step of such a problem as CasADi functions of (k, x, u, p, d).

d is what a step is given besides: its row of ``step_data`` and the problem's data (:mod:`ocnopt.captured`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import casadi
import torch
from torch import Tensor

from ocnopt.captured import given_rows as rows_of_functions
from ocnopt.captured import of_problems, substituted
from ocnopt.checks import clipped
from ocnopt.paths import Widened, looked_up, rows_stand_alone
from ocnopt.solvers.lowered.limits import refused
from ocnopt.solvers.lowered.steps import Limits
from ocnopt.solvers.lowering.lowering import Lowering, lower, scattered
from ocnopt.staged import StagedOCP

# Beyond this many operations a step, building takes seconds (derivatives of single numbers).
_OPERATIONS = 2500
_ELSEWHERE = "kernel='torch' takes any torch code"

Function = Callable[..., Any]


class LoweredStep(NamedTuple):
    """The step (k, x, u, p, d) -> (x_next, cost) and the end (x, p, d) -> Phi; ``seen`` calls all that they call."""

    step: casadi.Function
    end: casadi.Function
    seen: tuple[Lowering, ...]

    def require_same(self, problem: StagedOCP) -> None:
        """Compare what they call with what it was.

        Raises:
            ProblemError: something that the functions capture has changed, and is not among the data.
        """
        for lowering in self.seen:
            lowering.require_same(_first_given(problem))


def _first_given(problem: StagedOCP) -> list[Tensor]:
    """What the first step of the first problem is given besides, as a batch of one; the data themselves without one."""
    if not problem.batch_shape:
        return [*([] if problem.step_data is None else [problem.step_data[0]]), *problem.data]
    one = lambda v: v[(slice(1),) * len(problem.batch_shape)].detach()  # noqa: E731
    table = [] if problem.step_data is None else [one(problem.step_data[0])]
    return [*table, *of_problems(problem.data, problem.batch_shape, one)]


def lower_step(problem: StagedOCP, u: Tensor, p: Tensor) -> LoweredStep:
    """Lower the step and the end, compared with torch.

    In a batch, where every row must stand alone, the first row is lowered, as a batch of one.

    Args:
        problem: one stage for all steps.
        u: first controls ``(*batch, m)``, near which to compare.
        p: static controls ``(*batch, q)``.

    Raises:
        ProblemError: the functions tell the problems of a batch apart, cannot be lowered, or are too large.
    """
    if not rows_stand_alone(Widened(problem)):
        raise refused("its functions tell the problems of the batch apart: they hold data of each, or mix their rows")
    stage, start, data = problem.groups[0].stage, problem.initial_state, problem.data
    one = lambda v: v[(slice(1),) * len(problem.batch_shape)]  # noqa: E731
    counted, tabled = stage.joint is None, problem.step_data is not None
    k = torch.tensor(0) if counted else start.new_tensor(0.0)
    given = [v.detach().clone() for v in _first_given(problem)]

    def step(k: Tensor, x: Tensor, u: Tensor, p: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        row, own = (given[0], given[1:]) if tabled else (None, given)
        with substituted(data, own):
            if not counted:
                return problem.advance(stage, k, x, u, p, row)
            return looked_up(partial(problem.advance, stage), k, x, u, p)

    def end(x: Tensor, p: Tensor, *given: Tensor) -> Tensor:
        row, own = (given[0], given[1:]) if tabled else (None, given)
        with substituted(data, own):
            return problem.terminal(x, p, row)

    called: Any = stage.parts

    def parts(k: Tensor, x: Tensor, u: Tensor, p: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        with substituted(data, given[tabled:]):
            once = looked_up(called, k, x, u, p) if counted else called(k, x, u, p, *given[:tabled])
        return *once, end(x, p, *given)

    first = problem.for_rows(0) if problem.batch_shape else problem
    numbers, bounds = torch.linspace(0, problem.steps - 1, 4).round().tolist(), first.step_bounds
    points = [
        [torch.full_like(k, number), x, clipped(u, bounds[int(number)]), clipped(p, first.parameter_bounds), *d]
        for number, (x, u, p, *d) in zip(numbers, scattered([one(start), one(u), one(p), *given]), strict=True)
    ]
    ends = [[x, p, *d] for _, x, _, p, *d in points]
    lowerings = (
        lower(step, points, "the step", elsewhere=_ELSEWHERE),
        lower(end, ends, "the terminal cost", elsewhere=_ELSEWHERE),
    )
    functions = (_small(lowerings[0], "step"), _small(lowerings[1], "terminal cost"))
    _check_slopes(functions[0], step, points[1:], "step")
    _check_slopes(functions[1], lambda *xp: (end(*xp),), ends[1:], "terminal cost")
    # a Runge-Kutta step calls everything at each of its stages; what has changed shows at one
    seen: tuple[Lowering, ...] = lowerings
    if called is not None:
        seen = (lower(parts, points, "a function of the problem", elsewhere=_ELSEWHERE),)
        seen[0].function()
    return LoweredStep(_joined(functions[0], 4), _joined(functions[1], 2), seen)


def control_limits(problem: StagedOCP) -> tuple[Limits | None, Tensor]:
    """The control bounds, None where they vary, and a column ``(N + 1, lanes, 1)`` for each that does."""
    limits: list[list[float | None]] = []
    columns = [problem.initial_state.new_zeros(problem.steps, 1, 0)]
    for side in problem.control_bounds[0] or ():
        # (steps or 1, lanes or 1, m)
        table = side.reshape(side.shape[:-1][:1].numel(), side.shape[1:-1].numel(), side.shape[-1])
        same = (table == table[0, 0]).all(0).all(0)
        pairs = zip(table[0, 0].tolist(), same.tolist(), strict=True)
        limits.append([value if alike else None for value, alike in pairs])
        columns.append(table[..., ~same].expand(problem.steps, -1, -1))
    lanes = max(column.shape[1] for column in columns)
    columns = [column.expand(-1, lanes, -1) for column in columns]
    varying = torch.cat(columns, dim=-1)
    # the end has no control, and its row is not looked at
    return (limits[0], limits[1]) if limits else None, torch.cat([varying, varying[-1:]])


def given_rows(problem: StagedOCP, bounds: Tensor) -> Tensor:
    """What each step is given besides, ``(N + 1, lanes, s)``: the functions' part, then the bounds that vary."""
    rows = rows_of_functions(problem)
    if not bounds.shape[-1]:
        return rows
    lanes = max(rows.shape[1], bounds.shape[1])
    return torch.cat([part.expand(-1, lanes, -1) for part in (rows, bounds)], dim=-1)


def _joined(function: casadi.Function, own: int) -> casadi.Function:
    """The function with all arguments behind its ``own`` ones as one column."""
    symbols = [casadi.SX.sym(f"a{i}", function.numel_in(i)) for i in range(function.n_in())]
    outputs = casadi.cse(function.call(symbols))
    return casadi.Function(function.name(), [*symbols[:own], casadi.vertcat(*symbols[own:])], outputs)


def _small(lowering: Lowering, name: str) -> casadi.Function:
    if lowering.kind is not casadi.SX:
        raise refused(f"its {name} has wide matrix products")
    function = lowering.function()
    if function.n_instructions() > _OPERATIONS:
        raise refused(f"its {name} takes {function.n_instructions()} operations, more than {_OPERATIONS}")
    return function


def _check_slopes(lowered: casadi.Function, function: Function, points: Sequence[Sequence[Tensor]], name: str) -> None:
    """Compare derivatives with torch's: a detached part or a backward of the user's own shows in them alone."""
    symbols = [casadi.SX.sym(f"a{i}", lowered.numel_in(i)) for i in range(lowered.n_in())]
    outputs = lowered.call(symbols)
    weights = [torch.linspace(1.0, 2.0, int(output.numel()), dtype=torch.float64) for output in outputs]
    total = sum(casadi.dot(casadi.DM(w.numpy()), output) for w, output in zip(weights, outputs, strict=True))
    slope = casadi.Function("slope", symbols, [casadi.gradient(total, casadi.vertcat(*symbols))])
    for point in points:
        leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in point]
        with torch.enable_grad():
            values = zip(weights, function(*leaves), strict=True)
            y = sum(((w * value.reshape(-1)).sum() for w, value in values), torch.zeros(()).double())
        if not bool(torch.isfinite(y)):
            continue  # outside the function's domain, where no derivative means anything
        wanted = leaves[name == "step" :]
        right = [torch.zeros_like(a) for a in wanted]
        if y.requires_grad:
            right = list(torch.autograd.grad(y, wanted, allow_unused=True, materialize_grads=True))
        columns = [casadi.DM(a.detach().double().reshape(-1).numpy()) for a in leaves]
        got = torch.from_numpy(slope(*columns).full()[:, 0])
        expected = torch.cat([a.reshape(-1) for a in right])
        # the number of a step stands first and alone
        error = (got[name == "step" :] - expected).abs()
        scale = 1 + float(expected.nan_to_num(0.0).abs().max()) if expected.numel() else 1.0
        if bool((error > 1e-6 * scale).any()):
            raise refused(f"the {name}'s derivatives are not torch's: a part is detached, or has a backward of its own")
