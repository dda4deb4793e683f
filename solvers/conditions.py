"""Pontryagin's conditions of one problem as scipy.integrate.solve_bvp takes them: functions on a mesh, with Jacobians.

Shapes: mesh s ``(K)``, unknown functions y = (x, lambda, r) ``(2n + q, K)``, unknown numbers (p, nu) ``(q + e)``. The
conditions are stated in :mod:`ocnopt.solvers.indirect`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.linearise import derivatives
from ocnopt.ocp import Lifted
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.hamiltonian import Hamiltonian
from ocnopt.staged import StagedOCP

Vector = NDArray[np.float64]

# Gauss points of the cost on each interval of the mesh.
_GAUSS = 5


class Collocated(NamedTuple):
    """Where a round of collocation ended: mesh s ``(K)``, y ``(2n + q, K)``, the numbers (p, nu), its spline."""

    s: Vector
    y: Vector
    numbers: Vector
    spline: Any
    residual: float
    status: int


class NoMoreStepsError(Exception):
    """The iteration limit, the time limit or Ctrl-C, raised out of scipy's loop."""


class Steps:
    """Newton steps: how many were taken, and why there may be no more."""

    def __init__(self, limit: int, stopwatch: Stopwatch) -> None:
        self.taken = 0
        self.stopped: int | None = None
        self._limit, self._stopwatch = limit, stopwatch

    def take(self) -> None:
        """Count one.

        Raises:
            NoMoreStepsError: there is none left.
        """
        self.stopped = self._stopwatch.reason
        if self.stopped is not None or self.taken >= self._limit:
            raise NoMoreStepsError
        self.taken += 1


class Conditions:
    """Pontryagin's conditions of one problem as scipy.integrate.solve_bvp takes them."""

    def __init__(self, problem: StagedOCP, lifted: Lifted, steps: Steps) -> None:
        self.problem, self.h, self.steps = problem, Hamiltonian(lifted), steps
        self.n, self.m, self.q = self.h.n, self.h.m, self.h.q
        self.x0 = array(problem.initial_state)
        box, infinite = problem.parameter_bounds, np.full(self.q, np.inf)
        self.box = (-infinite, infinite) if box is None else (array(box[0]), array(box[1]))
        self._controls: tuple[Vector, Vector] = (np.zeros(1), np.zeros((self.m, 1)))
        self._seen: dict[bytes, Tensor] = {}

    def tensor(self, value: Any) -> Tensor:
        """Numbers as the problem's functions take them."""
        return torch.as_tensor(value, dtype=self.problem.dtype, device=self.problem.device)

    def remember(self, s: Vector, u: Vector) -> None:
        """Controls ``(m, K)`` from which the minimum of H is looked for."""
        if np.isfinite(u).all():
            self._controls = (np.array(s), np.array(u))

    def at(self, s: Vector, y: Vector, numbers: Vector) -> Tensor:
        """w ``(K, d)`` with the controls that minimise H."""
        key = b"".join(v.tobytes() for v in (s, y, numbers))
        if key not in self._seen:
            while len(self._seen) >= 4:
                del self._seen[next(iter(self._seen))]
            u = [np.interp(s, self._controls[0], row) for row in self._controls[1]]
            p = np.clip(numbers[: self.q], *self.box)
            rows = [*y[: 2 * self.n], *u, *(np.full_like(s, value) for value in p)]
            self._seen[key] = self.h.minimise(self.tensor(s), self.tensor(np.stack(rows, axis=-1)))
        return self._seen[key]

    def slopes(self, s: Vector, y: Vector, numbers: Vector) -> Vector:
        """y' ``(2n + q, K)``."""
        w = self.at(s, y, numbers)
        return array(self.h.rates(self.tensor(s), w)).T

    def jacobian(self, s: Vector, y: Vector, numbers: Vector) -> tuple[Vector, Vector]:
        """y'_y ``(2n + q, 2n + q, K)`` and y' in the numbers ``(2n + q, q + e, K)``."""
        w = self.at(s, y, numbers)
        self.remember(s, array(w[:, self.h.u]).T)
        in_y, in_p = map(array, self.h.slopes(self.h.local(self.tensor(s), w), w))
        lead, size = (len(s), y.shape[0]), 2 * self.n
        dy, dp = np.zeros((*lead, y.shape[0])), np.zeros((*lead, numbers.size))
        dy[:, :, :size], dp[:, :, : self.q] = in_y, in_p * self._inside(numbers)
        return np.moveaxis(dy, 0, -1), np.moveaxis(dp, 0, -1)

    def _inside(self, numbers: Vector) -> Vector:
        p = numbers[: self.q]
        return ((p >= self.box[0]) & (p <= self.box[1])).astype(np.float64)

    def end(self, x: Vector, numbers: Vector) -> tuple[Vector, Vector, Vector]:
        """Phi and e at the end ``(1 + e)`` with derivatives in (x, p)."""
        problem, n = self.problem, self.n

        def of(z: Tensor) -> Tensor:
            x, p = z[..., :n], z[..., n:]
            return torch.cat([problem.terminal(x, p)[..., None], problem.end_error(x, p)], dim=-1)

        z = self.tensor(np.concatenate([x, np.clip(numbers[: self.q], *self.box)]))
        count = 1 if problem.terminal_constraint is None else 1 + numbers.size - self.q
        value, slope, curvature = derivatives(of, z, count, hessian=True)
        return array(value), array(slope), array(curvature)

    def boundary(self, ya: Vector, yb: Vector, numbers: Vector) -> Vector:
        """The conditions at both ends ``(2n + 2q + e)``."""
        n, q = self.n, self.q
        value, slope, _ = self.end(yb[:n], numbers)
        L = np.concatenate([[1.0], numbers[q:]]) @ slope
        p = np.clip(numbers[:q], *self.box)
        still = numbers[:q] - np.clip(p - (yb[2 * n :] + L[n:]), *self.box)
        return np.concatenate([ya[:n] - self.x0, ya[2 * n :], yb[n : 2 * n] - L[:n], value[1:], still])

    def boundary_jacobian(self, ya: Vector, yb: Vector, numbers: Vector) -> tuple[Vector, Vector, Vector]:
        """Derivatives of :meth:`boundary` in y at both ends and in the numbers."""
        self.steps.take()
        n, q, size = self.n, self.q, ya.size
        value, slope, curvature = self.end(yb[:n], numbers)
        weights = np.concatenate([[1.0], numbers[q:]])
        L, LL = weights @ slope, np.tensordot(weights, curvature, 1)
        inside = self._inside(numbers)
        a, b = np.zeros((size + numbers.size, size)), np.zeros((size + numbers.size, size))
        c = np.zeros((size + numbers.size, numbers.size))
        a[:n, :n], a[n : n + q, 2 * n :] = np.eye(n), np.eye(q)
        row = slice(n + q, 2 * n + q)
        b[row, n : 2 * n], b[row, :n] = np.eye(n), -LL[:n, :n]
        c[row, :q], c[row, q:] = -LL[:n, n:] * inside, -slope[1:, :n].T
        row = slice(row.stop, row.stop + value.size - 1)
        b[row, :n], c[row, :q] = slope[1:, :n], slope[1:, n:] * inside
        row = slice(row.stop, None)
        moved = np.clip(numbers[:q], *self.box) - (yb[2 * n :] + L[n:])
        free = ((moved > self.box[0]) & (moved < self.box[1])).astype(np.float64)[:, None]
        b[row, 2 * n :], b[row, :n] = free * np.eye(q), free * LL[n:, :n]
        c[row, :q] = np.eye(q) + free * (LL[n:, n:] * inside - np.diag(inside))
        c[row, q:] = free * slope[1:, n:].T
        return a, b, c

    def cost(self, path: Collocated) -> float:
        """The Lagrangian along the spline."""
        points, weights = np.polynomial.legendre.leggauss(_GAUSS)
        h = np.diff(path.s)[:, None]
        s = (path.s[:-1, None] + 0.5 * h * (1 + points)).reshape(-1)
        y = path.spline(s)
        w, n = self.at(s, y, path.numbers), self.n
        inner = array(self.h.value(self.tensor(s), w)) - (y[n : 2 * n] * path.spline(s, 1)[:n]).sum(0)
        value = self.end(path.y[:n, -1], path.numbers)[0]
        return float((0.5 * h * weights).reshape(-1) @ inner + value[0] + path.numbers[self.q :] @ value[1:])


def array(value: Tensor) -> Vector:
    """A tensor as numpy has it."""
    return value.detach().to(torch.float64).cpu().numpy()
