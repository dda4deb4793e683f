r"""The indirect method: Pontryagin's conditions as a boundary-value problem, solved by collocation.

With H(s, x, lambda, u, p) = l + lambda . F:

    x' = H_lambda,   lambda' = -H_x,   r' = H_p,   u = argmin of H over the box of u
    x(s0) = x_0,   r(s0) = 0,   lambda(s1) = Phi_x + e_x^T nu,   e(x(s1), p) = 0,   r(s1) + Phi_p + e_p^T nu = 0

The unknown functions are y = (x, lambda, r), the unknown numbers (p, nu); a free T is the last entry of p and s runs
over the unit interval. Where p is at a bound, the last condition reads p = clip(p - (r + Phi_p + e_p^T nu)). The
Jacobian is exact. The minimum over u is the one near the first path's control, found by projected Newton steps.

The cost is that of the continuous problem: Phi + nu . e + integral of (l + lambda . (F - x')) along the collocation
spline. What is added to the cost there vanishes on the solution, and with it errors of first order.

Source: Bryson and Ho, Applied Optimal Control, 1975, sections 2.3-2.8 and 3.8; Kierzenka and Shampine, A BVP solver
based on residual control and the Matlab PSE, ACM TOMS 27, 2001 (the collocation, as in scipy.integrate.solve_bvp).
"""

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_bvp
from scipy.interpolate import CubicSpline

from ocnopt.checks import can_differentiate, check_choice, no_constraints, solver_options
from ocnopt.errors import ProblemError
from ocnopt.paths import behind
from ocnopt.solvers.alone import Attempt, each_alone, one_for_all
from ocnopt.solvers.conditions import Collocated, Conditions, NoMoreStepsError, Steps, Vector, array
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.direct.casadi_solver import CasADi
from ocnopt.solvers.endings import Stopwatch, stopped
from ocnopt.solvers.rounds import PreparedAugmented
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import StagedOCP

# Rounds of tolerance on the way to the last: each starts from the mesh and the path of the one before.
_ROUNDS = (1e-3, 1e-5)
# Who finds the first path.
_STARTS: dict[str, Any] = {"ddp": DDP, "casadi": CasADi}
# The stubs of scipy know no arguments that are chosen at run time.
_SOLVE_BVP: Any = solve_bvp
# How scipy's solver ends, and one more end.
_MESH, _SINGULAR, _OUT_OF_STEPS = 1, 2, 4


@dataclass(frozen=True)
class Indirect:
    """Pontryagin's boundary-value problem by collocation with a mesh of its own, from DDP's or IPOPT's path.

    ``cost``, states, costates, parameters and T are those of the continuous problem; the N steps of ``solve`` serve
    for the first path and for where the answer is read off: states and costates at the nodes, controls in the middle
    of the steps. So the cost differs from that of the other solvers by the error of N constant controls. There are no
    gains.

    It needs a control that minimises the Hamiltonian smoothly: where H is linear in a control, the minimum jumps
    between the bounds or is not unique (bang-bang and singular arcs), and the problem is refused rather than smoothed,
    which would silently answer another one. Path constraints are refused.

    Attributes:
        start: who finds the first path and its costates: "ddp", "casadi", or "auto", which asks "casadi" where "ddp"
            does not converge.
        max_iterations: Newton steps, over all meshes.
        tolerance: of scipy.integrate.solve_bvp, for the relative residual on every interval of the mesh and for the
            conditions at the ends.
        time_limit: seconds after which a solve stops with what it has, a batch as a whole; None for no limit.
        max_nodes: points of the mesh allowed.

    Raises:
        ProblemError: an option out of its range.
    """

    start: str = "auto"
    max_iterations: int = 200
    tolerance: float = 1e-6
    time_limit: float | None = None
    max_nodes: int = 20000

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("auto", "ddp", "casadi"))
        positive = ["tolerance", *([] if self.time_limit is None else ["time_limit"])]
        solver_options(self, at_least={"max_iterations": 1, "max_nodes": 2}, positive=positive)

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the continuous problem behind a discrete one; the problems of a batch one by one.

        Raises:
            ProblemError: path constraints, a problem in float32 or discrete from the start, or H linear in a control.
            NonFiniteError: a single problem has no finite path to start from.
        """
        return PreparedIndirect(self, None).solve(problem, guess, progress=progress)

    def prepare(self, problem: StagedOCP, guess: Guess) -> "PreparedIndirect":
        """Check the problem and build the solver that finds the first path.

        Raises:
            ProblemError: as for :meth:`solve`, but for what shows along a path alone.
        """
        _check(problem)
        single = one_for_all(problem, guess)
        if single is None:
            return PreparedIndirect(self, None)
        name = "casadi" if self.start == "casadi" else "ddp"
        return PreparedIndirect(self, {name: _STARTS[name]().prepare(*single)})


@dataclass(frozen=True)
class PreparedIndirect:
    """A solver for one problem, whose initial state and data may change.

    ``kept`` are the solvers for the first path by name, built for one problem that stands for all; None where each
    problem needs its own.
    """

    solver: Indirect
    kept: dict[str, Any] | None

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the problem as it is now; raises as :meth:`Indirect.solve`."""
        _check(problem)

        def solve_one(single: StagedOCP, start: Guess) -> Attempt:
            return self._solve_one(single, start, stopwatch, progress)

        with Stopwatch(self.solver.time_limit) as stopwatch:
            return each_alone(problem, guess, solve_one, stopwatch)

    def _solve_one(self, problem: StagedOCP, guess: Guess, stopwatch: Stopwatch, progress: bool) -> Attempt:
        began = time.perf_counter()
        name, first = self._start(problem, guess, stopwatch)
        conditions, path = _first_path(problem, first, Steps(self.solver.max_iterations, stopwatch))
        history: dict[str, list[float]] = {"cost": [float(first.cost)], "residual": [np.nan], "nodes": [path.s.size]}
        rounds = [tol for tol in _ROUNDS if tol > self.solver.tolerance]
        for tol in [*rounds, self.solver.tolerance]:
            try:
                found = self._collocate(conditions, path, tol)
            except NoMoreStepsError:
                path = path._replace(status=_OUT_OF_STEPS)
                break
            # a round that fails may end worse than the one before
            path = (
                found if found.status == 0 or not found.residual > path.residual else path._replace(status=found.status)
            )
            row = {"cost": conditions.cost(path), "residual": path.residual, "nodes": path.s.size}
            for key, value in row.items():
                history[key].append(value)
            if progress:
                newton = conditions.steps.taken
                print(f"{newton:4d}  cost {row['cost']:.10g}  residual {path.residual:.1e}  nodes {path.s.size}")  # noqa: T201
            if path.status in (_MESH, _SINGULAR) or not np.isfinite(path.y).all():
                break
        status = _status(self.solver, conditions.steps, path, name, first)
        return _attempt(problem, conditions, path, history, status, time.perf_counter() - began)

    def _start(self, problem: StagedOCP, guess: Guess, stopwatch: Stopwatch) -> tuple[str, Result]:
        """Who found the first path, and the path."""
        asked = self.solver.start
        if asked == "casadi":
            return "casadi", self._found_by("casadi", problem, guess, stopwatch)
        first = self._found_by("ddp", problem, guess, stopwatch)
        if asked == "ddp" or bool(first.converged) or stopwatch.reason is not None:
            return "ddp", first
        second = self._found_by("casadi", problem, guess, stopwatch)
        return ("casadi", second) if bool(second.converged) else ("ddp", first)

    def _found_by(self, name: str, problem: StagedOCP, guess: Guess, stopwatch: Stopwatch) -> Result:
        """Another solver's answer; that solver is built once, where it serves all problems."""
        left, made = stopwatch.left, _STARTS[name]
        if self.kept is not None and name not in self.kept:
            self.kept[name] = made().prepare(problem, guess)
        solver = made(time_limit=left) if self.kept is None else _timed(self.kept[name], left)
        found: Result = solver.solve(problem, guess)
        return found

    def _collocate(self, conditions: Conditions, path: Collocated, tol: float) -> Collocated:
        """One round of scipy's solver."""
        c, none = conditions, np.zeros(0)
        functions: dict[str, Any] = {
            "fun": c.slopes,
            "bc": c.boundary,
            "fun_jac": c.jacobian,
            "bc_jac": c.boundary_jacobian,
        }
        if not path.numbers.size:
            # scipy leaves the numbers out where there are none
            functions = {
                "fun": lambda s, y: c.slopes(s, y, none),
                "bc": lambda a, b: c.boundary(a, b, none),
                "fun_jac": lambda s, y: c.jacobian(s, y, none)[0],
                "bc_jac": lambda a, b: c.boundary_jacobian(a, b, none)[:2],
            }
        given = {"p": path.numbers} if path.numbers.size else {}
        room = max(int(self.solver.max_nodes), path.s.size)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # scipy warns of what the status says
            warnings.simplefilter("ignore")
            found = _SOLVE_BVP(x=path.s, y=path.y, tol=tol, max_nodes=room, **functions, **given)
        numbers = none if found.p is None else found.p
        return Collocated(found.x, found.y, numbers, found.sol, float(found.rms_residuals.max()), int(found.status))


def _timed(prepared: Any, limit: float | None) -> Any:
    """The same with another time limit."""
    if isinstance(prepared, PreparedAugmented):
        return replace(prepared, inner=_timed(prepared.inner, limit))
    return replace(prepared, solver=replace(prepared.solver, time_limit=limit))


def _check(problem: StagedOCP) -> None:
    """Refuse what Pontryagin's conditions here do not hold.

    Raises:
        ProblemError: names it, and the solver that can.
    """
    can_differentiate()
    no_constraints(problem, "indirect", "does not find its multipliers")
    rows = range(torch.Size(problem.batch_shape).numel()) if problem.bounds_differ else ()
    for one in [problem.for_rows(row) for row in rows] or [problem]:
        if any(bounds is not None and bounds[0].ndim > 1 for bounds in one.control_bounds):
            raise ProblemError(
                "the problem has control_bounds that vary in time; solver 'indirect' takes one vector for all times: "
                "use solver='ddp' or 'casadi'"
            )
    if problem.step_data is not None:
        raise ProblemError(
            "the problem has step_data, numbers given to each of its steps; solver 'indirect' knows no steps: "
            "expected the problem before it was augmented, or use solver='ddp'"
        )
    if problem.dtype != torch.float64:
        raise ProblemError(
            f"the problem is in {problem.dtype}; solver 'indirect' needs the digits of torch.float64: make the "
            "problem with dtype=torch.float64, or use solver='ddp'"
        )
    if problem.origin is None:
        raise ProblemError(
            "the problem is discrete from the start; solver 'indirect' needs dynamics in continuous time: write it "
            "as an oc.OCP, with a whole number of steps, or use solver='ddp'"
        )


def _first_path(problem: StagedOCP, first: Result, steps: Steps) -> tuple[Conditions, Collocated]:
    """The conditions, and another solver's answer as a path: mesh at the nodes, costates, multipliers by least squares.

    Raises:
        ProblemError: H is linear in a control along that path.
    """
    lifted = problem.origin
    if lifted is None or first.costates is None:
        raise ProblemError("a path without costates is no start; expected one of DDP or CasADi")
    c = Conditions(problem, lifted, steps)
    states, costates, controls = (array(behind(v)) for v in (first.states, first.costates, first.controls))  # type: ignore[arg-type]
    p = array(first.parameters)
    s = np.linspace(lifted.t0, lifted.t1, len(states))
    if c.m:
        middle = 0.5 * (s[1:] + s[:-1])
        c.remember(middle, controls.T)
    n, q = c.n, c.q
    empty = np.zeros(c.problem.end_error(c.tensor(states[-1]), c.tensor(p)).shape[-1])
    _, slope, _ = c.end(states[-1], np.concatenate([p, empty]))
    nu = np.linalg.lstsq(slope[1:, :n].T, costates[-1] - slope[0, :n], rcond=None)[0] if empty.size else empty
    y = np.concatenate([states.T, costates.T, np.zeros((q, len(s)))])
    numbers = np.concatenate([p, nu])
    w = c.at(s, y, numbers)
    here = c.h.local(c.tensor(s), w)
    _refuse_linear(array(here.curvature[:, c.h.u, c.h.u]), array(here.curvature))
    rate = c.slopes(s, y, numbers)[2 * n :]
    y[2 * n :, 1:] = np.cumsum(0.5 * np.diff(s) * (rate[:, 1:] + rate[:, :-1]), axis=1)
    return c, Collocated(s, y, numbers, CubicSpline(s, y, axis=1), np.inf, 0)


def _refuse_linear(Huu: Vector, H: Vector) -> None:
    """Refuse a control along whose axis H has no curvature anywhere."""
    size = np.abs(Huu).max(axis=(0, 1), initial=0.0)
    flat = np.flatnonzero(size <= 1e-9 * (1 + np.abs(H).max(initial=0.0)))
    if flat.size:
        raise ProblemError(
            f"the Hamiltonian is linear in control {flat[0]}, so that its minimum jumps between the bounds or is not "
            "unique; solver 'indirect' expects a smooth one: use solver='casadi', or add a small multiple of the "
            "square of the control to running_cost"
        )


def _status(options: Indirect, steps: Steps, path: Collocated, name: str, first: Result) -> tuple[bool, str]:
    """Whether it converged, and one sentence."""
    done = f"{steps.taken} Newton step{'' if steps.taken == 1 else 's'}"
    where = f"{path.s.size} mesh points, relative residual {path.residual:.1e}"
    if path.status == 0 and np.isfinite(path.y).all() and np.isfinite(path.residual):
        return True, f"converged after {done} (collocation on {where}; cost of the continuous problem)"
    reason, advice = {
        _MESH: (
            f"the mesh limit of {options.max_nodes} points was reached",
            "raise max_nodes or loosen tolerance=, or look for a control that jumps or a kink in the functions",
        ),
        _SINGULAR: (
            "the equations are singular",
            "take more steps for the start, or use solver='casadi': H may be linear in a control, or terminal "
            "constraints repeat each other",
        ),
        _OUT_OF_STEPS: (
            stopped(steps.stopped)
            if steps.stopped is not None
            else ("the iteration limit was reached", "raise max_iterations, or take more steps for the start")
        ),
    }.get(
        path.status, ("the conditions at the ends are not met", "loosen tolerance=, or take more steps for the start")
    )
    # at a mesh that may not grow scipy's residual may be no number where the path is fine
    finite = bool(np.isfinite(path.y).all()) and (path.status == _MESH or np.isfinite(path.residual))
    if not finite and path.status != _OUT_OF_STEPS:
        reason, advice = "a function or its derivative is NaN or infinite on the way", "start inside their domain"
    start = "" if bool(first.converged) else f"; the first path by {name} had not converged ({first.status})"
    return False, f"stopped after {done}: {reason} ({where}); {advice}{start}"


def _attempt(
    problem: StagedOCP,
    c: Conditions,
    path: Collocated,
    history: dict[str, Any],
    status: tuple[bool, str],
    wall_time: float,
) -> Attempt:
    """The answer at the nodes of the N steps."""
    n, s = c.n, np.linspace(path.s[0], path.s[-1], problem.steps + 1)
    y, middle = path.spline(s), 0.5 * (s[1:] + s[:-1])
    w = c.at(middle, path.spline(middle), path.numbers)
    wrong = np.abs(c.end(path.y[:n, -1], path.numbers)[0][1:])
    return Attempt(
        states=c.tensor(y[:n].T),
        controls=w[:, c.h.u],
        costates=c.tensor(y[n : 2 * n].T),
        parameters=c.tensor(np.clip(path.numbers[: c.q], *c.box)),
        cost=history["cost"][-1],
        converged=status[0],
        iterations=c.steps.taken,
        status=status[1],
        violation=float(max(wrong.max(initial=0.0), path.residual)),
        wall_time=wall_time,
        history=history,
        multipliers=None if wrong.size == 0 else {"terminal_constraint": c.tensor(path.numbers[c.q :])},
    )
