"""Affine-quadratic problems with their exact answers, by dense linear algebra in numpy.

    x_{k+1} = A_k x + B_k u + D_k p + c_k,   cost_k = 1/2 w^T H_k w + h_k^T w with w = (x, u, p),
    terminal cost 1/2 z^T E z + e^T z with z = (x, p)

Shapes: A (N, n, n), B (N, n, m), D (N, n, q), c (N, n), H (N, d, d), h (N, d) with d = n + m + q, E (n + q, n + q).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocnopt.staged import Stage, StagedOCP


@dataclass(frozen=True, eq=False)
class AffineQuadratic:
    """The matrices of one problem, float64 tensors."""

    A: Tensor
    B: Tensor
    D: Tensor
    c: Tensor
    H: Tensor
    h: Tensor
    E: Tensor
    e: Tensor
    x0: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, n, m, q."""
        return (*self.B.shape, self.D.shape[-1])

    def staged(self, **options: Any) -> StagedOCP:
        """The problem as the library sees it: one stage for all steps, which looks its matrices up by k."""
        q = self.sizes[-1]

        def dynamics(k, x, u, *p):
            static = times(self.D[k], p[0]) if q else 0.0
            return times(self.A[k], x) + times(self.B[k], u) + static + self.c[k]

        def cost(k, x, u, *p):
            w = torch.cat([x, u, *p], dim=-1)
            return 0.5 * (w * times(self.H[k], w)).sum(-1) + (self.h[k] * w).sum(-1)

        def terminal(x, *p):
            z = torch.cat([x, *p], dim=-1)
            return 0.5 * (z * times(self.E, z)).sum(-1) + (self.e * z).sum(-1)

        settings = {"initial_state": self.x0, "steps": self.sizes[0]} | options
        if q:
            settings |= {"parameters": torch.zeros(q)}
        return StagedOCP(Stage(dynamics, cost, self.sizes[2]), terminal, **settings)

    def solve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """States (N + 1, n), controls (N, m), parameters (q) and cost from the one KKT system of the whole problem."""
        N, n, m, q = self.sizes
        size = N * m + q + (N + 1) * n
        hessian, gradient = np.zeros((size, size)), np.zeros(size)
        rows, right = np.zeros(((N + 1) * n, size)), np.zeros((N + 1) * n)
        static = np.arange(N * m, N * m + q)
        states = np.arange(N * m + q, size).reshape(N + 1, n)
        controls = np.arange(N * m).reshape(N, m)
        rows[:n, states[0]], right[:n] = np.eye(n), self.x0.numpy()
        for k in range(N):
            w = np.concatenate([states[k], controls[k], static])
            hessian[np.ix_(w, w)] += self.H[k].numpy()
            gradient[w] += self.h[k].numpy()
            block = slice((k + 1) * n, (k + 2) * n)
            rows[block, states[k + 1]] = np.eye(n)
            rows[block, states[k]] = -self.A[k].numpy()
            rows[block, controls[k]] = -self.B[k].numpy()
            rows[block, static] = -self.D[k].numpy()
            right[block] = self.c[k].numpy()
        z = np.concatenate([states[N], static])
        hessian[np.ix_(z, z)] += self.E.numpy()
        gradient[z] += self.e.numpy()
        zero = np.zeros((len(right), len(right)))
        solution = np.linalg.solve(np.block([[hessian, rows.T], [rows, zero]]), np.concatenate([-gradient, right]))
        v = solution[:size]
        return v[states], v[controls], v[static], float(0.5 * v @ hessian @ v + gradient @ v)

    def riccati(self) -> tuple[np.ndarray, np.ndarray]:
        """Without static controls: feedback gains K (N, m, n) and cost-to-go Hessians P (N + 1, n, n)."""
        N, n, _, _ = self.sizes
        gains, P = [], [self.E.numpy()]
        for k in reversed(range(N)):
            A, B, H = (matrix[k].numpy() for matrix in (self.A, self.B, self.H))
            Quu, Qux = H[n:, n:] + B.T @ P[0] @ B, H[n:, :n] + B.T @ P[0] @ A
            gains.insert(0, -np.linalg.solve(Quu, Qux))
            P.insert(0, H[:n, :n] + A.T @ P[0] @ A + Qux.T @ gains[0])
        return np.stack(gains), np.stack(P)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix-vector product over leading axes."""
    return (matrix @ vector[..., None])[..., 0]


def random_affine_quadratic(seed: int, N: int, n: int, m: int, q: int = 0) -> AffineQuadratic:
    """A problem that is convex in all variables together, cross terms included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d = n + m + q
    root, end = draw(N, d, d), draw(n + q, n + q)
    return AffineQuadratic(
        A=draw(N, n, n) / n**0.5,
        B=draw(N, n, m),
        D=draw(N, n, q),
        c=draw(N, n),
        H=root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64),
        h=draw(N, d),
        E=end @ end.mT,
        e=draw(n + q),
        x0=draw(n),
    )
