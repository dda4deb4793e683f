"""``solve``: a problem and a solver's name in, a :class:`Solution` out. Thin: read, transcribe, delegate."""

from dataclasses import fields
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from ocnopt.checks import nearest
from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.ocp import OCP
from ocnopt.solvers.guess import Guess, read_guess
from ocnopt.solvers.solution import Solution
from ocnopt.staged import StagedOCP, transcribe

_SOLVERS = {"ddp": ("ocnopt.solvers.ddp", "DDP"), "casadi": ("ocnopt.solvers.direct.casadi_solver", "CasADi")}


@runtime_checkable
class Solver(Protocol):
    """A frozen record of options with one method."""

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Solution:
        """Solve the discrete problem from a guess; the continuous one is ``problem.origin``."""
        ...


def solve(
    problem: OCP | StagedOCP,
    solver: str | Solver = "ddp",
    *,
    steps: int = 100,
    integrator: str = "rk4",
    initial_guess: Any = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Solution:
    """Solve an optimal-control problem; a leading batch shape means independent problems.

    Args:
        problem: continuous, or discrete (then ``steps`` and ``integrator`` are not used).
        solver: "ddp", "casadi", or a solver object.
        steps: N equal steps with one constant control each.
        integrator: "euler", "midpoint", "rk4", ...
        initial_guess: controls ``(..., N, m)``, a mapping with any of controls, states, parameters, horizon, or a
            Solution.
        max_iterations: of the solver; its own default if None.
        tolerance: of the solver; its own default if None.
        strict: raise instead of returning what did not converge.
        progress: show the iterations.
        **options: the solver's own.

    Raises:
        ProblemError: unknown solver or option, or a problem that the solver cannot handle (the message says which can).
        ConvergenceError: ``strict`` and not converged.

    Example:
        >>> cost = lambda t, x, u: (x**2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0)
        >>> round(float(solve(problem, steps=200).cost), 4)  # tanh(1)
        0.7616
    """
    given = {"max_iterations": max_iterations, "tolerance": tolerance}
    chosen = make_solver(solver, {**options, **{key: value for key, value in given.items() if value is not None}})
    staged = problem if isinstance(problem, StagedOCP) else transcribe(problem, steps, integrator)
    solution = chosen.solve(staged, read_guess(staged, initial_guess), progress=progress)
    if strict and not bool(solution.converged.all()):
        raise ConvergenceError(f"not converged: {solution.status}; pass strict=False to look at the result")
    return solution


def make_solver(solver: str | Solver, options: dict[str, Any]) -> Solver:
    """A solver object from a name and its options; an object is taken as it is."""
    if not isinstance(solver, str):
        if not isinstance(solver, Solver):
            raise ProblemError(
                f"solver is {type(solver).__name__}; expected a name ({', '.join(_SOLVERS)}) or a solver object "
                "such as oc.solvers.DDP()"
            )
        if options:
            raise ProblemError(
                f"options {', '.join(options)} came beside a solver object; expected them in its constructor"
            )
        return solver
    if solver not in _SOLVERS:
        raise ProblemError(
            f"solver {solver!r} is unknown; expected one of {', '.join(_SOLVERS)}{nearest(solver, _SOLVERS)}"
        )
    module, name = _SOLVERS[solver]
    kind = getattr(import_module(module), name)
    known = [f.name for f in fields(kind)]
    for option in options:
        if option not in known:
            offer = nearest(option, known)
            raise ProblemError(f"solver {solver!r} has no option {option!r}; expected one of {', '.join(known)}{offer}")
    made: Solver = kind(**options)
    return made
