"""The "shooting" solver: scipy.optimize on the cost as a function of the controls, see :mod:`ocnopt.solvers.shot`.

Source: Nocedal and Wright, Numerical Optimization, 2006, chapters 4 (trust regions), 7 (Newton-CG, L-BFGS), 18 (SQP).
"""

import time
from dataclasses import dataclass

import torch

from ocnopt.checks import can_differentiate, check_choice, no_constraints, solver_options
from ocnopt.errors import ProblemError
from ocnopt.paths import Widened
from ocnopt.solvers.alone import Attempt, each_alone, one_for_all
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.descent import METHODS, Search
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.kernels import Kernel
from ocnopt.solvers.shot import Shot, first_point
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import StagedOCP

# What "auto" takes: the first that the problem allows.
_PREFERRED = ("trust-exact", "L-BFGS-B", "SLSQP")


@dataclass(frozen=True)
class Shooting:
    """Single shooting with scipy.optimize: exact gradients by the adjoint, exact products with the Hessian.

    It solves the discrete problem itself, so its optimum is DDP's. It takes bounds and terminal constraints where the
    method does, returns no feedback gains, and works the problems of a batch off one by one. Where it ends in a
    saddle, where the cost curves down along some direction, it goes on along that direction.

    Attributes:
        method: of scipy.optimize.minimize: "trust-exact", "trust-krylov", "trust-ncg", "Newton-CG" (these with second
            derivatives), "BFGS" and "CG" for problems without bounds and terminal constraints; "L-BFGS-B", "TNC" with
            bounds; "trust-constr" (second derivatives) with terminal constraints; "SLSQP" with both. "auto" takes the
            first of "trust-exact", "L-BFGS-B", "SLSQP" that takes what the problem has.
        max_iterations: of scipy's method.
        tolerance: of the gradient for scipy. An end counts as converged where no entry of the gradient, projected on
            the bounds, exceeds ``100 * tolerance * (1 + |cost|)``.
        time_limit: seconds after which a solve stops with what it has, a batch as a whole; None for no limit.

    Raises:
        ProblemError: an option out of its range.
    """

    method: str = "auto"
    max_iterations: int = 1000
    tolerance: float = 1e-8
    time_limit: float | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("auto", *METHODS))
        positive = ["tolerance", *([] if self.time_limit is None else ["time_limit"])]
        solver_options(self, at_least={"max_iterations": 1}, positive=positive)

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve a discrete problem from a guess.

        A guess with states is made a path by one sweep of DDP, whose feedback law is rolled out.

        Raises:
            ProblemError: path constraints, or bounds or terminal constraints that the method does not take.
            NonFiniteError: the first path of a single problem is not finite.
        """
        prepared = self._build(problem, guess, fixed=True)
        return prepared.solve(problem, guess, progress=progress)._replace(build_time=prepared.build_time)

    def prepare(self, problem: StagedOCP, guess: Guess) -> "PreparedShooting":
        """Choose the method and build what rolls out; raises :class:`ProblemError` as :meth:`solve`."""
        return self._build(problem, guess, fixed=False)

    def _build(self, problem: StagedOCP, guess: Guess, *, fixed: bool) -> "PreparedShooting":
        can_differentiate()
        began, method, single = time.perf_counter(), self._method(problem), one_for_all(problem, guess)
        with torch.no_grad():
            kernel = single and DDP().make_kernel(Widened(single[0]), single[1], "auto" if fixed else True)
        return PreparedShooting(self, method, kernel, time.perf_counter() - began, fixed)

    def _method(self, problem: StagedOCP) -> str:
        """The method for this problem, or a refusal."""
        no_constraints(problem, "shooting", "has no unknown states to constrain")
        has = {
            "control_bounds or parameter_bounds": any(problem.control_bounds) or problem.parameter_bounds is not None,
            "a terminal_constraint": problem.terminal_constraint is not None,
        }
        lacks = {
            name: [what for (what, needed), able in zip(has.items(), skill[:2], strict=True) if needed and not able]
            for name, skill in METHODS.items()
        }
        able = [name for name, missing in lacks.items() if not missing]
        if self.method == "auto":
            return next(name for name in _PREFERRED if name in able)
        if self.method not in able:
            raise ProblemError(
                f"the problem has {lacks[self.method][0]}, which method {self.method!r} of solver 'shooting' does not "
                f"take: use one of {', '.join(able)}, or solver='casadi'"
            )
        return self.method


@dataclass(frozen=True)
class PreparedShooting:
    """A solver for one problem, whose initial state, data and ``step_data`` may change.

    ``kernel`` serves all problems of a batch; None where each needs its own. Where they are ``fixed``, it is not asked
    to take them up.
    """

    solver: Shooting
    method: str
    kernel: Kernel | None
    build_time: float
    fixed: bool = False

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the problem as it is now.

        Raises:
            ProblemError: something else of it has changed.
            NonFiniteError: as for :meth:`Shooting.solve`.
        """

        def solve_one(single: StagedOCP, start: Guess) -> Attempt:
            began = time.perf_counter()
            search = Search(self.solver, self.method, Shot(single, kernel_of(single, start)), stopwatch, progress)
            search.run(first_point(search.shot, start))
            return search.attempt(time.perf_counter() - began)

        def kernel_of(single: StagedOCP, start: Guess) -> Kernel:
            if self.kernel is None:
                return DDP().make_kernel(Widened(single), start)
            if not self.fixed or problem.step_data is not None:
                self.kernel.refresh(single)
            return self.kernel

        with Stopwatch(self.solver.time_limit) as stopwatch:
            return each_alone(problem, guess, solve_one, stopwatch)
