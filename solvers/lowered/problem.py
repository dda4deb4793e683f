"""Which problems can be lowered, and the one step of such a problem as CasADi functions of (k, x, u, p)."""

from collections.abc import Callable, Sequence
from typing import Any

import casadi
import torch
from torch import Tensor

from ocnopt.checks import clipped
from ocnopt.paths import rows_stand_alone
from ocnopt.solvers.lowered.limits import refused
from ocnopt.solvers.lowering.lowering import Lowering, lower, scattered
from ocnopt.staged import StagedOCP, Widened

# Beyond this many operations a step, building takes seconds (derivatives of single numbers).
_OPERATIONS = 2500
_ELSEWHERE = "kernel='torch' takes any torch code"

Function = Callable[..., Any]


def lower_step(problem: StagedOCP, u: Tensor, p: Tensor) -> tuple[casadi.Function, casadi.Function]:
    """Lower the step (k, x, u, p) -> (x_next, cost) and the end (x, p) -> Phi, compared with torch at random points.

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
    stage, start = problem.groups[0].stage, problem.initial_state
    first = [v[(slice(1),) * len(problem.batch_shape)] for v in (start, u, p)]
    counted = stage.joint is None
    k = torch.tensor(0) if counted else start.new_tensor(0.0)

    def step(k: Tensor, x: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        if not counted:
            return problem.advance(stage, k, x, u, p)
        # A leading axis turns a table lookup table[k] into an indexing that can be traced.
        x_next, cost = problem.advance(stage, k.reshape((1,) * x.ndim), x[None], u[None], p[None])
        return x_next[0], cost[0]

    def end(x: Tensor, p: Tensor) -> Tensor:
        return problem.terminal(x, p)

    numbers = torch.linspace(0, problem.steps - 1, 4).round().tolist()
    points = [
        [torch.full_like(k, number), x, clipped(u, problem.control_bounds[0]), clipped(p, problem.parameter_bounds)]
        for number, (x, u, p) in zip(numbers, scattered(first), strict=True)
    ]
    ends = [[x, p] for _, x, _, p in points]
    functions = (
        _small(lower(step, points, "the step", elsewhere=_ELSEWHERE), "step"),
        _small(lower(end, ends, "the terminal cost", elsewhere=_ELSEWHERE), "terminal cost"),
    )
    _check_slopes(functions[0], step, points[1:], "step")
    _check_slopes(functions[1], lambda *xp: (end(*xp),), ends[1:], "terminal cost")
    return functions


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
        wanted = [a for a in leaves if a.requires_grad and a.ndim]
        right = [torch.zeros_like(a) for a in wanted]
        if y.requires_grad:
            right = list(torch.autograd.grad(y, wanted, allow_unused=True, materialize_grads=True))
        columns = [casadi.DM(a.detach().double().reshape(-1).numpy()) for a in leaves]
        got = torch.from_numpy(slope(*columns).full()[:, 0])
        expected = torch.cat([a.reshape(-1) for a in right])
        # a step number, where there is one, stands first and alone
        error = (got[got.numel() - expected.numel() :] - expected).abs()
        scale = 1 + float(expected.nan_to_num(0.0).abs().max()) if expected.numel() else 1.0
        if bool((error > 1e-6 * scale).any()):
            raise refused(f"the {name}'s derivatives are not torch's: a part is detached, or has a backward of its own")
