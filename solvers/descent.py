"""One run of scipy.optimize.minimize over :class:`ocnopt.solvers.shot.Shot`, and what is made of its end."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds as Box
from scipy.optimize import NonlinearConstraint, minimize
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from ocnopt.solvers.alone import Attempt
from ocnopt.solvers.endings import Stopwatch, stopped
from ocnopt.solvers.shot import NEAR, Shot, Vector, find_direction, kept

# The stubs of scipy know no options that are chosen at run time.
_MINIMIZE: Any = minimize
# scipy's own tests differ; an end is one where the gradient is this many times the tolerance or smaller.
_SLACK = 100.0
# Up to this size all eigenvalues are found at once.
_DENSE = 600
# In a dtype coarser than float64, so many rounds of steps that each change the cost by few roundings end a search.
_ROUNDINGS, _FLAT_ROUNDS = 4, 2
# Steps between two feedback laws.
_ROUND = 15
# How often a search goes on from a saddle, and how far it first looks.
_SADDLES, _AWAY = 3, (1.0, 0.3, 0.1, 0.03, 0.01)


class _StoppedError(Exception):
    """The time limit or Ctrl-C, raised out of scipy's loop."""


class Skill(NamedTuple):
    """What a method of scipy takes."""

    bounds: bool
    ends: bool
    hessian: bool


METHODS = {
    "trust-exact": Skill(bounds=False, ends=False, hessian=True),
    "trust-krylov": Skill(bounds=False, ends=False, hessian=True),
    "trust-ncg": Skill(bounds=False, ends=False, hessian=True),
    "Newton-CG": Skill(bounds=False, ends=False, hessian=True),
    "trust-constr": Skill(bounds=False, ends=True, hessian=True),
    "L-BFGS-B": Skill(bounds=True, ends=False, hessian=False),
    "TNC": Skill(bounds=True, ends=False, hessian=False),
    "SLSQP": Skill(bounds=True, ends=True, hessian=False),
    "BFGS": Skill(bounds=False, ends=False, hessian=False),
    "CG": Skill(bounds=False, ends=False, hessian=False),
}


class Search:
    """One problem: the run of scipy's method and what is made of its end; ``options`` are a ``Shooting``."""

    def __init__(self, options: Any, method: str, shot: Shot, stopwatch: Stopwatch, progress: bool) -> None:
        self.options, self.method, self.shot, self.print = options, method, shot, progress
        self.stopwatch = stopwatch
        self.stopped: int | None = None
        self.box = shot.box()
        self.v = np.zeros(0)
        self.costs: list[float] = []
        self.steps: list[float] = []
        self.saddles = 0
        self.constrained = shot.problem.terminal_constraint is not None
        self.coarse = shot.problem.dtype if shot.problem.dtype != torch.float64 else None
        self.exhausted = False
        self._products: dict[bytes, Any] = {}

    def run(self, v: Vector) -> None:
        """Minimise from v, and go on from a saddle."""
        self.v = v if self.box is None else np.clip(v, *self.box)
        self.costs, self.steps = [self.shot.cost(self.v)], [0.0]
        flat = 0
        while self._room() > 0 and v.size:
            before, cost = len(self.costs), self.costs[-1]
            self.note(self._minimise())
            self._recentre()
            still = len(self.costs) == before
            flat = flat + 1 if abs(cost - self.costs[-1]) <= self._flat() * (1 + abs(cost)) else 0
            self.exhausted = self.coarse is not None and (still or flat >= _FLAT_ROUNDS)
            if self._settled() or self.exhausted or still:
                away = self._escape() if self.saddles < _SADDLES and self._room() > 0 else None
                if away is None:
                    return
                self.saddles += 1
                self.note(away)
                self._recentre()

    def _room(self) -> int:
        """How many steps are left; none once it is time to stop."""
        self.stopped = self.stopwatch.reason
        if self.stopped is not None:
            return 0
        return int(self.options.max_iterations) - len(self.costs) + 1

    def _recentre(self) -> None:
        """Put the feedback law around the path that was reached; one from afar makes a poor unknown of v."""
        path = self.shot.path(self.v)
        direction = find_direction(self.shot.wide, path)
        if direction is not None:
            self.shot.stabilise(path, direction)
            self.v = self.shot.join(path.controls, path.states[0, self.shot.n - self.shot.q :])
            self._products.clear()

    def note(self, v: Vector) -> None:
        """Keep an accepted point."""
        step = float(np.linalg.norm(v - self.v))
        if step == 0.0:
            return
        self.v = np.array(v)
        self.costs.append(self.shot.cost(self.v))
        self.steps.append(step)
        if self.print:
            print(f"{len(self.costs) - 1:4d}  cost {self.costs[-1]:.10g}  step {step:.3g}")  # noqa: T201

    def _minimise(self) -> Vector:
        """Where scipy's method ends."""
        shot, skill = self.shot, METHODS[self.method]
        unit = np.eye(1 + shot.end_error(self.v).size)
        arguments: dict[str, Any] = {
            "jac": lambda v: np.nan_to_num(shot.gradient(v), posinf=0.0, neginf=0.0),
            "callback": lambda v, *rest: self.note(v),
        }
        if skill.hessian:
            arguments["hessp"] = lambda v, dv: self._curvature(v, unit[0])(dv)
        if self.method == "trust-exact":
            arguments["hess"] = lambda v: self._curvature(v, unit[0])(np.eye(v.size))
            del arguments["hessp"]
        if self.box is not None:
            arguments["bounds"] = Box(*self.box)
        if len(unit) > 1:
            bend: Any = lambda v, nu: self._operator(v, unit[1:].T @ nu)  # noqa: E731
            arguments["constraints"] = NonlinearConstraint(shot.end_error, 0.0, 0.0, jac=shot.end_jacobian, hess=bend)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # scipy warns of what the status says
            warnings.simplefilter("ignore")
            try:
                ended = _MINIMIZE(self._cost, self.v, method=self.method, options=self._settings(), **arguments)
            except (_StoppedError, np.linalg.LinAlgError):
                return self.v
            except ValueError as error:
                # a derivative that is no number, in scipy's linear algebra: its own words, not an error of the user's
                if "infs or NaNs" not in str(error):
                    raise
                return self.v
        return np.asarray(ended.x if self.box is None else np.clip(ended.x, *self.box), dtype=np.float64)

    def _cost(self, v: Vector) -> float:
        """J, until it is time to stop."""
        if self.stopwatch.reason is not None:
            raise _StoppedError
        return self.shot.cost(v)

    def _settings(self) -> dict[str, Any]:
        tol, room = self.options.tolerance, min(self._room(), _ROUND)
        flat = self._flat()
        own: dict[str, dict[str, Any]] = {
            "Newton-CG": {"xtol": 1e-3 * tol},
            "L-BFGS-B": {"gtol": tol, "ftol": flat, "maxcor": 50, "maxfun": 100 * room, "maxls": 50},
            "TNC": {"gtol": tol, "ftol": flat, "xtol": 0.0, "maxfun": 100 * room},
            "SLSQP": {"ftol": max(1e-3 * tol, flat)},
            "trust-constr": {"gtol": tol, "xtol": 1e-12, "barrier_tol": tol, "sparse_jacobian": False},
        }
        return {"maxiter": room, **own.get(self.method, {"gtol": tol})}

    def _curvature(self, v: Vector, weights: Vector) -> Callable[[Vector], Vector]:
        key = np.concatenate([v, weights])
        return kept(self._products, key, lambda: self.shot.curvature(v, weights))

    def _operator(self, v: Vector, weights: Vector) -> LinearOperator:
        size = self.v.size
        return LinearOperator((size, size), matvec=self._curvature(v, weights), dtype=np.float64)

    def _free(self) -> NDArray[np.bool_]:
        """Which unknowns are not at a bound."""
        if self.box is None:
            return np.ones(self.v.size, dtype=bool)
        return (self.v - self.box[0] > NEAR) & (self.box[1] - self.v > NEAR)

    def multipliers(self) -> Vector:
        """nu of the terminal constraint, from the gradient of what is free."""
        if not self.constrained:
            return np.zeros(0)
        free = self._free()
        if not np.isfinite(self.shot.gradient(self.v)).all():
            return np.zeros(self.shot.end_error(self.v).size)
        jacobian, gradient = self.shot.end_jacobian(self.v)[:, free], self.shot.gradient(self.v)[free]
        return np.asarray(np.linalg.lstsq(jacobian.T, -gradient, rcond=None)[0])

    def remaining(self) -> float:
        """The largest entry of the gradient projected on the bounds, of the Lagrangian where the end is constrained."""
        gradient = self.shot.gradient(self.v, self.multipliers())
        if not np.isfinite(gradient).all():
            return np.inf
        moved = self.v - gradient
        moved = moved if self.box is None else np.clip(moved, *self.box)
        return float(np.abs(self.v - moved).max(initial=0.0))

    def _flat(self) -> float:
        """The share of the cost that its rounding hides, where that is coarser than in float64."""
        return 0.0 if self.coarse is None else _ROUNDINGS * float(torch.finfo(self.coarse).eps)

    def _settled(self) -> bool:
        scale = 1 + abs(self.costs[-1])
        tolerance = _SLACK * self.options.tolerance
        if self.exhausted:
            # about a minimum the cost is flat to rounding where the gradient is below the root of it
            tolerance = max(tolerance, self._flat() ** 0.5)
        return self.remaining() <= tolerance * scale and self._violation() <= 1e-6

    def _violation(self) -> float:
        return float(np.abs(self.shot.end_error(self.v)).max(initial=0.0))

    def _escape(self) -> Vector | None:
        """A lower point beside a saddle; none where this is no saddle."""
        free = self._free().nonzero()[0]
        if self.constrained or not free.size or not self._settled():
            return None
        curve = self._curvature(self.v, np.ones(1))

        def product(dv: Vector) -> Vector:
            full = np.zeros((self.v.size, *np.shape(dv)[1:]))
            full[free] = dv
            return curve(full)[free]

        value, direction = _lowest(product, free.size)
        if value >= -1e-6 * max(1.0, abs(self.costs[-1])):
            return None
        points = []
        for size in (sign * length for length in _AWAY for sign in (1.0, -1.0)):
            away = self.v.copy()
            away[free] += size * direction
            points.append(away if self.box is None else np.clip(away, *self.box))
        best = min(points, key=self.shot.cost)
        return best if self.shot.cost(best) < self.costs[-1] else None

    def attempt(self, wall_time: float) -> Attempt:
        """The end as an answer."""
        shot, p = self.shot, self.shot.split(self.v)[1]
        path, like = shot.path(self.v), self.shot.problem.initial_state
        costates = shot.pull(self.v, np.concatenate([[1.0], self.multipliers()])[:, None])[0][..., 0]
        found = torch.as_tensor(costates[:, : shot.n - shot.q], dtype=like.dtype, device=like.device)
        settled = bool(self._settled())
        return Attempt(
            states=shot.wide.split(path.states)[0],
            controls=shot.wide.cut(path.controls, shot.wide.control_sizes),
            costates=shot.wide.cut(found, shot.wide.state_sizes),
            parameters=p,
            cost=float(path.cost),
            converged=settled,
            iterations=len(self.costs) - 1,
            status=self._status(settled),
            violation=self._violation(),
            wall_time=wall_time,
            history={"cost": self.costs, "step": self.steps},
            multipliers={"terminal_constraint": like.new_tensor(self.multipliers())} if self.constrained else None,
        )

    def _status(self, settled: bool) -> str:
        count = len(self.costs) - 1
        steps = f"{count} step{'' if count == 1 else 's'}"
        saddles = "" if not self.saddles else f", {self.saddles} of them away from a saddle"
        if settled:
            limit = f" to what {self.coarse} resolves, a gradient of {self.remaining():.1e}" if self.exhausted else ""
            return f"converged after {steps}{saddles}{limit} ({self.method})"
        gradient = f"the gradient is still {self.remaining():.1e}"
        if self._violation() > 1e-6:
            gradient += f" and the terminal constraint violated by {self._violation():.1e}"
        if self.stopped is not None:
            reason, advice = stopped(self.stopped)
        elif count >= self.options.max_iterations:
            reason, advice = "the iteration limit was reached", "raise max_iterations, or start from this solution"
        elif not np.isfinite(self.remaining()):
            reason = "a derivative is NaN or infinite"
            advice = "look for a square root, a norm or a division at zero, or start elsewhere"
        elif self.costs[-1] < -1e20:
            reason, advice = "the cost falls without bound", "bound the controls, or look for a cost without a minimum"
        elif self.exhausted:
            reason, advice = f"{self.coarse} resolves the cost no further", "pass dtype=torch.float64 to the problem"
        else:
            reason = "scipy found no further descent"
            advice = "look for a kink in the functions, take another method=, or use solver='ddp'"
        return f"stopped after {steps}{saddles}: {reason}; {gradient}; {advice} ({self.method})"


def _lowest(product: Callable[[Vector], Vector], size: int) -> tuple[float, Vector]:
    """The smallest eigenvalue of a symmetric operator and its vector; zero where it cannot be found."""
    if size <= _DENSE:
        matrix = product(np.eye(size))
        if not np.isfinite(matrix).all():
            return 0.0, np.zeros(size)
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
        return float(values[0]), vectors[:, 0]
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    first = np.random.default_rng(0).standard_normal(size)
    try:
        values, vectors = eigsh(operator, k=1, which="SA", v0=first, tol=1e-3, maxiter=20 * size)
    except ArpackError:
        return 0.0, first
    return float(values[0]), vectors[:, 0]
