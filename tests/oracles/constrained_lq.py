"""Affine-quadratic problems with bounds, path and terminal constraints, and their answers by a dense active-set method.

    minimise the cost of an AffineQuadratic   subject to   lower <= u_k <= upper,   G x_k + F u_k <= g,   M x_N = r

The path constraint holds at the nodes 0..N, at N with the last control. Controls are the unknowns; states are affine in
them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from ocnopt.staged import StagedOCP
from tests.oracles.lq import AffineQuadratic, random_affine_quadratic, times


@dataclass(frozen=True, eq=False)
class ConstrainedLQ:
    """The matrices, float64; no bounds where ``bounds`` is None, no constraint where there are no rows."""

    free: AffineQuadratic
    bounds: tuple[Tensor, Tensor] | None
    G: Tensor
    F: Tensor
    g: Tensor
    M: Tensor
    r: Tensor

    def staged(self, **options: Any) -> StagedOCP:
        """The problem as the library sees it."""
        path = (lambda k, x, u, *p: times(self.G, x) + times(self.F, u) - self.g) if len(self.g) else None
        end = (lambda x, *p: times(self.M, x) - self.r) if len(self.r) else None
        return self.free.staged(control_bounds=self.bounds, path_constraint=path, terminal_constraint=end, **options)

    def solve(self) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
        """Controls (N, m), cost, multipliers of the end (e,) and of the path (N + 1, c)."""
        N, n, m, _ = self.free.sizes
        size = N * m
        # x_k = X[k] @ (U, 1)
        X = [np.hstack([np.zeros((n, size)), self.free.x0.numpy()[:, None]])]
        controls = [np.eye(m, size + 1, k * m) for k in range(N)]
        for k in range(N):
            step = self.free.A[k].numpy() @ X[k] + self.free.B[k].numpy() @ controls[k]
            step[:, -1] += self.free.c[k].numpy()
            X.append(step)
        total = np.zeros((size + 1, size + 1))
        for k in range(N):
            w, h = np.vstack([X[k], controls[k]]), self.free.h[k].numpy()
            total += 0.5 * w.T @ self.free.H[k].numpy() @ w
            total[-1] += h @ w
        total += 0.5 * X[N].T @ self.free.E.numpy() @ X[N]
        total[-1] += self.free.e.numpy() @ X[N]
        hessian, gradient = (total + total.T)[:size, :size], (total + total.T)[:size, -1]
        G, F, M = self.G.numpy(), self.F.numpy(), self.M.numpy()
        rows = [G @ X[k] + F @ controls[min(k, N - 1)] for k in range(N + 1)] + [M @ X[N]]
        limits = [self.g.numpy()] * (N + 1) + [self.r.numpy()]
        matrix = np.vstack(rows)
        right = np.concatenate(limits) - matrix[:, -1]
        split = (N + 1) * len(self.g)
        A, b, along = matrix[:split, :-1], right[:split], matrix[split:, :-1]
        if self.bounds is not None:
            lower, upper = (side.expand(N, m).reshape(-1).numpy() for side in self.bounds)
            A, b = np.vstack([A, np.eye(size), -np.eye(size)]), np.concatenate([b, upper, -lower])
        U, end, path = dense_qp(hessian, gradient, A, b, along, right[split:])
        cost = float(0.5 * U @ hessian @ U + gradient @ U + total[-1, -1])
        return U.reshape(N, m), cost, end, path[:split].reshape(N + 1, len(self.g))


def dense_qp(
    H: np.ndarray, g: np.ndarray, A: np.ndarray, b: np.ndarray, C: np.ndarray, d: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise 1/2 x^T H x + g^T x with A x <= b, C x = d; x, multipliers of C and of A.

    Equalities are eliminated, the rest is a least-distance problem. Source: Lawson and Hanson, Solving Least Squares
    Problems, 1974, chapter 23.
    """
    Z = scipy.linalg.null_space(C) if len(C) else np.eye(len(g))
    x0 = np.linalg.lstsq(C, d, rcond=None)[0] if len(C) else np.zeros(len(g))
    L = np.linalg.cholesky(Z.T @ H @ Z)
    shift = np.linalg.solve(Z.T @ H @ Z, Z.T @ (H @ x0 + g))
    y, inequality = -shift, np.zeros(len(b))
    if len(b):
        rows = -A @ Z @ np.linalg.inv(L).T
        distance = -b + A @ (x0 - Z @ shift)
        u, _ = scipy.optimize.nnls(np.vstack([rows.T, distance]), np.append(np.zeros(len(y)), 1.0), maxiter=10000)
        length = distance @ u - 1.0
        inequality = -u / length
        y = np.linalg.solve(L.T, rows.T @ inequality) - shift
    x = x0 + Z @ y
    residual = H @ x + g + A.T @ inequality
    return x, -np.linalg.lstsq(C.T, residual, rcond=None)[0] if len(C) else np.zeros(0), inequality


def random_constrained_lq(seed: int, N: int, n: int, m: int, *, bounded: bool, paths: int, ends: int) -> ConstrainedLQ:
    """A convex problem that some path within the bounds satisfies."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    free = random_affine_quadratic(seed, N, n, m)
    G, F, M, inside = draw(paths, n), draw(paths, m), draw(ends, n), draw(N, m).clamp(-0.5, 0.5)
    states = [free.x0]
    for k in range(N):
        states.append(times(free.A[k], states[k]) + times(free.B[k], inside[k]) + free.c[k])
    X, U = torch.stack(states), torch.cat([inside, inside[-1:]])
    g = (times(G, X) + times(F, U)).amax(0) + 0.1 if paths else torch.zeros(0).double()
    bounds = (torch.full((m,), -0.7).double(), torch.full((m,), 0.8).double()) if bounded else None
    return ConstrainedLQ(free, bounds, G, F, g, M, times(M, X[-1]))
