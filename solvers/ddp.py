r"""Differential dynamic programming.

One iteration: expand the path (local models of every stage), sweep backwards (gains), search along the step (roll the feedback law out),
accept or raise the regularisation. Static controls and a free T are part of the state with a free first value; an infeasible start keeps
gaps g_k = f(x_k, u_k) - x_{k+1}, which a step of size alpha shrinks to (1 - alpha) g_k. Problems of a batch are independent: each has its
own step size, regularisation and stop.

Source: Mayne 1966; Tassa, Mansard and Todorov, ICRA 2014 (bounds, regularisation schedule); Mastalli et al., ICRA 2020 (gaps).
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError
from ocnopt.expansion import expand_path, expand_terminal
from ocnopt.solvers.ddp_state import Direction, Iterate, Monitor, start
from ocnopt.solvers.ddp_steps import find_direction, line_search
from ocnopt.solvers.guess import Guess
from ocnopt.solvers.solution import Solution
from ocnopt.solvers.wrap_up import make_solution
from ocnopt.staged import StagedOCP, static_as_state

Curvature = Literal["exact", "gauss_newton", "auto"]


@dataclass(frozen=True)
class DDP:
    """DDP with feedback gains, box bounds, infeasible start, static parameters, free T and batches.

    Attributes:
        curvature: "exact" keeps the second derivatives of the dynamics; "gauss_newton" (iLQR) drops them; "auto" is exact, and Gauss-Newton in
            iterations where the exact model is not convex. While gaps are open, "exact" does the same.
        max_iterations: sweeps allowed.
        tolerance: stop when the predicted decrease falls below ``tolerance**2 * (1 + |cost|)`` and every gap below ``tolerance``.
        regularisation: first value of mu; it starts at zero and rises only when a sweep or a line search fails.
    """

    curvature: Curvature = "auto"
    max_iterations: int = 500
    tolerance: float = 1e-8
    regularisation: float = 0.0

    def __post_init__(self) -> None:
        known = ("exact", "gauss_newton", "auto")
        if self.curvature not in known:
            raise ProblemError(f"curvature is {self.curvature!r}; expected one of {', '.join(known)}{nearest(str(self.curvature), known)}")
        if self.max_iterations < 1 or self.tolerance <= 0 or self.regularisation < 0:
            raise ProblemError(
                f"DDP(max_iterations={self.max_iterations}, tolerance={self.tolerance}, regularisation={self.regularisation}); expected a positive "
                "number of iterations, a positive tolerance and a regularisation >= 0"
            )

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Solution:
        """Solve a discrete problem from a guess.

        Raises:
            ProblemError: the problem has terminal or path constraints, which need multipliers.
            NonFiniteError: the first path of a single problem is not finite.
        """
        _refuse_constraints(problem)
        began = time.perf_counter()
        with torch.no_grad():
            wide = static_as_state(problem)
            iterate = start(problem, wide, guess)
            monitor = Monitor(iterate, self.regularisation, self.tolerance, progress)
            direction = None
            for _ in range(self.max_iterations):
                direction = self._direction(problem, wide, iterate, monitor.mu)
                if monitor.finished(iterate, direction):
                    break
                iterate, step = line_search(wide, iterate, direction, active=monitor.active & direction.solvable)
                monitor.record(iterate, direction, step)
        return _solution(problem, iterate, direction, monitor, time.perf_counter() - began)

    def _direction(self, problem: StagedOCP, wide: StagedOCP, iterate: Iterate, mu: Tensor) -> Direction:
        models = expand_path(wide, iterate.states, iterate.controls, second_order=self.curvature != "gauss_newton")
        terminal = expand_terminal(wide, iterate.states[-1])
        direction = find_direction(problem, iterate, models, terminal, mu)
        # An infeasible path's costates belong to no trajectory: its exact curvature misleads more than it helps.
        mixed = self.curvature == "auto" or (self.curvature == "exact" and iterate.gaps is not None)
        if not mixed or bool(direction.solvable.all()):
            return direction
        convex = find_direction(problem, iterate, [model._replace(fww=None) for model in models], terminal, mu)
        return direction.where(direction.solvable, convex)


def _refuse_constraints(problem: StagedOCP) -> None:
    for name in ("terminal_constraint", "path_constraint"):
        if getattr(problem, name) is not None:
            raise ProblemError(f"the problem has a {name}; solver 'ddp' has no multipliers for it: use solver='casadi', or a penalty in the cost")


def _solution(problem: StagedOCP, iterate: Iterate, direction: Direction | None, monitor: Monitor, seconds: float) -> Solution:
    q, n = problem.parameter_dim, [x.shape[-1] - problem.parameter_dim for x in iterate.states]
    gains = costates = None
    if direction is not None:
        gains = (direction.k, [K[..., :size] for K, size in zip(direction.K, n, strict=False)])
        costates = [costate[..., :size] for costate, size in zip(direction.costates, n, strict=True)]
    return make_solution(
        problem,
        states=[x[..., :size] for x, size in zip(iterate.states, n, strict=True)],
        controls=iterate.controls,
        parameters=iterate.states[0][..., n[0] : n[0] + q],
        cost=iterate.cost,
        converged=monitor.converged,
        iterations=monitor.iterations,
        status=monitor.status(iterate),
        constraint_violation=iterate.gap_size(),
        wall_time=seconds,
        build_time=0.0,
        history=monitor.history(),
        costates=costates,
        gains=gains,
    )
