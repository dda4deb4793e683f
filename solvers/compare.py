"""``compare``: several solvers on one problem from one start, as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import OcnoptError, ProblemError
from ocnopt.ocp import OCP
from ocnopt.solvers.audit import audit
from ocnopt.solvers.endings import Stopwatch, stopped
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.solution import Solution, full_parameters, nodes_of
from ocnopt.solvers.solve import Solver, make_solution, make_solver, read_problem
from ocnopt.staged import StagedOCP

HEAD = ("solver", "cost", "T", "iterations", "time [s]", "build [s]", "max |dx|", "converged")
# Costs that agree to this are the same; paths that agree to this share of their size too.
_SAME, _NEAR = 1e-5, 0.05


@dataclass(frozen=True)
class Row:
    """One solver's line: worst case over a batch, cost summed over it; ``note`` says what the numbers do not."""

    solver: str
    cost: float
    horizon: float
    iterations: int
    wall_time: float
    build_time: float
    state_difference: float
    converged: bool
    status: str
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of ``HEAD``."""
        numbers = (f"{self.cost:.10g}", f"{self.horizon:.6g}", str(self.iterations))
        times = (f"{self.wall_time:.3f}", f"{self.build_time:.3f}")
        return self.solver, *numbers, *times, f"{self.state_difference:.1e}", "yes" if self.converged else "no"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows in the order asked for, and the solutions by solver name; ``print`` shows the table and the notes."""

    rows: tuple[Row, ...]
    solutions: dict[str, Solution]

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each solver that refused the problem or came to another minimum or cost."""
        return tuple(f"{row.solver}: {row.note}" for row in self.rows if row.note)

    def __str__(self) -> str:
        table = [HEAD, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
        return "\n".join([*("  ".join(line).rstrip() for line in padded), *self.notes])


def compare(
    problem: OCP | StagedOCP,
    solvers: Sequence[str | Solver] = ("ddp", "casadi"),
    *,
    steps: Any = 100,
    integrator: str = "rk4",
    initial_guess: Any = None,
) -> Comparison:
    """Solve with each solver from the same start.

    Args:
        problem: continuous or discrete.
        solvers: names or solver objects.
        steps: as for ``solve``, for a continuous problem.
        integrator: for a continuous problem.
        initial_guess: as for ``solve``.

    Returns:
        Rows with cost, T, iterations, time and the largest state difference to the first solver. A solver that refuses
        the problem has a row with the reason, one that converged to another minimum than the first a note: another
        cost of the same discrete problem, or another path. "indirect" and collocation solve another discretisation, or
        the continuous problem; there a cost that differs along nearly the same path is noted as that.

    Raises:
        ProblemError: no solvers, an unknown one, or no problem.
        OcnoptError: every solver refuses; what the first one said.
    """
    chosen = _read_solvers(solvers)
    staged = read_problem(problem, steps, integrator)
    guess = read_guess(staged, initial_guess)
    solutions: dict[str, Solution] = {}
    rows: list[Row] = []
    refusals: list[OcnoptError] = []
    with Stopwatch(None) as stopwatch:
        for name, solver in chosen.items():
            if stopwatch.reason is not None:
                rows.append(_absent(name, f"not started: {stopped(stopwatch.reason)[0]}"))
                continue
            try:
                solutions[name] = make_solution(staged, solver.solve(staged, guess))
            except OcnoptError as refusal:
                refusals.append(refusal)
                rows.append(_absent(name, f"refused: {refusal}"))
                continue
            rows.append(_row(name, solutions))
    if not solutions:
        raise refusals[0]
    return Comparison(tuple(rows), solutions)


def _read_solvers(solvers: Any) -> dict[str, Solver]:
    """Solver objects by name, primed where one comes again."""
    if isinstance(solvers, str | Solver) or not isinstance(solvers, Iterable):
        shown = repr(solvers) if isinstance(solvers, str) else type(solvers).__name__
        raise ProblemError(f"solvers is {shown}; expected several: write a tuple such as ('ddp', 'casadi')")
    chosen: dict[str, Solver] = {}
    for solver in solvers:
        made = make_solver(solver, {})
        name = solver if isinstance(solver, str) else type(solver).__name__.lower()
        while name in chosen:
            name += "'"
        chosen[name] = made
    if not chosen:
        raise ProblemError("solvers is empty; expected one or more: write a tuple such as ('ddp', 'casadi')")
    return chosen


def _row(name: str, solutions: dict[str, Solution]) -> Row:
    solution, first = solutions[name], next(iter(solutions))
    gaps = [
        (a - b).abs().amax() for a, b in zip(nodes_of(solution.states), nodes_of(solutions[first].states), strict=True)
    ]
    return Row(
        solver=name,
        cost=float(solution.cost.sum()),
        horizon=float(solution.horizon.max()),
        iterations=int(solution.iterations.max()),
        wall_time=solution.wall_time,
        build_time=solution.build_time,
        # torch's maximum keeps a NaN, Python's drops it
        state_difference=float(torch.stack(gaps).max()),
        converged=bool(solution.converged.all()),
        status=solution.status if isinstance(solution.status, str) else "; ".join(dict.fromkeys(solution.status)),
        note=_saddle(solution) or _other_minimum(solution, solutions[first], first),
    )


def _absent(name: str, why: str) -> Row:
    nan = float("nan")
    return Row(name, nan, nan, 0, 0.0, 0.0, nan, converged=False, status=why, note=why)


def _saddle(solution: Solution) -> str:
    """A sentence where an end is known to be no minimum."""
    if solution.saddle is None or not bool(solution.saddle.any()):
        return ""
    return f"a saddle, no minimum{_among(solution.saddle)}; start elsewhere, or with restarts="


def _other_minimum(solution: Solution, first: Solution, name: str) -> str:
    """A sentence where both converged, but to different costs or paths."""
    gap, both = (solution.cost - first.cost).abs(), solution.converged & first.converged
    larger = torch.maximum(solution.cost.abs(), first.cost.abs())
    far, apart = _paths_differ(solution, first), gap > _SAME * (1 + first.cost.abs())
    # two answers to one discrete problem have no other discretisation between them
    same_problem = _is_discrete(solution) & _is_discrete(first)
    reasons = {
        "another local minimum": apart & (far | same_problem),
        "the same minimum of another discretisation": apart & ~far & ~same_problem,
        "costs so near zero pass the absolute tolerances of IPOPT before the minimum; scale the cost up to compare": (
            (larger < _SAME) & (gap > _SAME * larger)
        ),
    }
    for reason, differs in reasons.items():
        other = both & differs
        if bool(other.any()):
            return f"cost differs from {name}'s by {float(gap[other].max()):.2g}{_among(other)}: {reason}"
    mirrored = both & ~apart & far
    if not bool(mirrored.any()):
        return ""
    return f"another minimum of the same cost as {name}'s{_among(mirrored)}, such as a mirror image: the states differ"


def _among(which: Tensor) -> str:
    """How many problems of a batch those are."""
    return f" in {int(which.sum())} of {which.numel()} problems" if which.ndim else ""


def _paths_differ(solution: Solution, first: Solution) -> Tensor:
    """Where states are apart by more than a small share of their size, or by NaN ``(*batch)``."""
    differ = torch.zeros_like(first.cost, dtype=torch.bool)
    pairs = list(zip(nodes_of(solution.states), nodes_of(first.states), strict=True))
    size = torch.stack([torch.maximum(a.abs().amax(-1), b.abs().amax(-1)) for a, b in pairs]).amax(0)
    for a, b in pairs:
        differ = differ | ~((a - b).abs().amax(-1) <= _NEAR * size + _SAME)
    return differ


def _is_discrete(solution: Solution) -> Tensor:
    """Where the answer is one of the discrete problem itself: its states follow from its controls ``(*batch)``."""
    problem = solution.problem
    if problem is None or problem.origin is None:
        return torch.ones_like(solution.cost, dtype=torch.bool)
    with torch.no_grad():
        found = audit(problem, nodes_of(solution.states), nodes_of(solution.controls), full_parameters(solution))
    return (found.gaps <= _SAME) & ((found.cost - solution.cost).abs() <= _SAME * (1 + solution.cost.abs()))
