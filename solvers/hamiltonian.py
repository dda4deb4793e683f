r"""The Hamiltonian H(s, x, lambda, u, p) = l + lambda . F of a problem, and its minimum over the box of u.

With w = (x, lambda, u, p) of size d, first and second derivatives of that one number give the equations of
Pontryagin's principle and their exact Jacobian, for all points of a mesh at once: x' = H_lambda, lambda' = -H_x,
r' = H_p, and du/dy = -H_uu^{-1} H_uy for the controls that are at no bound.

Source: Bryson and Ho, Applied Optimal Control, 1975, section 3.2; Bertsekas, Projected Newton methods, SIAM J. Control
20, 1982 (the minimum over the box).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import clipped
from ocnopt.linearise import derivatives, gradient
from ocnopt.ocp import Lifted

# Newton steps for the control, halvings of one, and the curvature below which H counts as flat.
_NEWTON, _HALVINGS, _FLAT = 50, 30, 1e-10


class Local(NamedTuple):
    """H and its derivatives in w at points of the mesh: ``(K)``, ``(K, d)``, ``(K, d, d)``."""

    value: Tensor
    slope: Tensor
    curvature: Tensor


class Hamiltonian:
    """H of one problem, and its minimum in u."""

    def __init__(self, lifted: Lifted) -> None:
        self.lifted = lifted
        self.n, self.m, self.q = lifted.state_dim, lifted.control_dim, lifted.parameter_dim
        self.bounds = lifted.problem.control_bounds_at(lifted.problem.horizon.t0)
        y = 2 * self.n
        self.x, self.costate = slice(0, self.n), slice(self.n, y)
        self.u, self.p = slice(y, y + self.m), slice(y + self.m, None)

    def value(self, s: Tensor, w: Tensor) -> Tensor:
        """H ``(..., K)`` at w ``(..., K, d)``."""
        x, u, p = w[..., self.x], w[..., self.u], w[..., self.p]
        slopes = self.lifted.dynamics(s, x, u, p)
        return self.lifted.running_cost(s, x, u, p) + (w[..., self.costate] * slopes).sum(-1)

    def local(self, s: Tensor, w: Tensor) -> Local:
        """H with its first two derivatives in all of w."""
        value, slope, curvature = derivatives(lambda v: self.value(s, v)[..., None], w, 1, hessian=True)
        return Local(value[..., 0], slope[..., 0, :], curvature[..., 0, :, :])

    def minimise(self, s: Tensor, w: Tensor) -> Tensor:
        """w with the controls that minimise H near those that it has."""
        if not self.m:
            return w
        w = w.clone()
        w[..., self.u] = clipped(w[..., self.u], self.bounds)
        for _ in range(_NEWTON):
            value, g, A = self._in_controls(s, w)
            step = self._step(w[..., self.u], g, A)
            size = (step.abs() / (1 + w[..., self.u].abs())).amax(-1)
            if not bool((size > 1e-13).any()):
                return w
            w = self._shorten(s, w, step, value, g)
            if not bool((size > 1e-9).any()):
                return w
        return w

    def _in_controls(self, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H, H_u and H_uu."""

        def of(u: Tensor) -> Tensor:
            rest = w.expand(*u.shape[:-1], w.shape[-1])
            return self.value(s, torch.cat([rest[..., : self.u.start], u, rest[..., self.p]], dim=-1))[..., None]

        value, g, A = derivatives(of, w[..., self.u], 1, hessian=True)
        return value[..., 0], g[..., 0, :], A[..., 0, :, :]

    def held(self, u: Tensor, g: Tensor) -> Tensor:
        """Which controls stay at a bound."""
        if self.bounds is None:
            return torch.zeros_like(u, dtype=torch.bool)
        lower, upper = self.bounds
        return ((u <= lower) & (g > 0)) | ((u >= upper) & (g < 0))

    def _step(self, u: Tensor, g: Tensor, A: Tensor) -> Tensor:
        """A Newton step of the free controls, downhill whatever the curvature."""
        free = (~self.held(u, g)).to(g.dtype)
        values, vectors = torch.linalg.eigh(_on_free(A, free))
        size = values.abs().clamp_min(_FLAT * (1 + values.abs().amax(-1, keepdim=True)))
        step = -(vectors @ ((vectors.mT @ (free * g)[..., None])[..., 0] / size)[..., None])[..., 0]
        return (clipped(u + free * step, self.bounds) - u).nan_to_num(0.0, 0.0, 0.0)

    def _shorten(self, s: Tensor, w: Tensor, step: Tensor, value: Tensor, g: Tensor) -> Tensor:
        """w after the longest halving of the step that lowers H."""
        alpha = torch.ones_like(value)
        slack = 1e-14 * (1 + value.abs())
        for _ in range(_HALVINGS):
            tried = w.clone()
            tried[..., self.u] = w[..., self.u] + alpha[..., None] * step
            enough = self.value(s, tried) <= value + 1e-4 * alpha * (g * step).sum(-1) + slack
            if bool(enough.all()):
                return tried
            alpha = torch.where(enough, alpha, 0.5 * alpha)
        tried[..., self.u] = torch.where(enough[..., None], tried[..., self.u], w[..., self.u])
        return tried

    def rates(self, s: Tensor, w: Tensor) -> Tensor:
        """y' = (H_lambda, -H_x, H_p), ``(K, 2n + q)``."""
        with torch.enable_grad():
            point = w.detach().clone().requires_grad_()
            (g,) = gradient(self.value(s, point), (point,))
        return torch.cat([g[..., self.costate], -g[..., self.x], g[..., self.p]], dim=-1)

    def slopes(self, here: Local, w: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of y' in (x, lambda) and in p, the control following."""
        u, W = self.u, here.curvature
        free = (~self.held(w[..., u], here.slope[..., u])).to(W.dtype)
        y, signs = slice(0, 2 * self.n), [(self.costate, 1.0), (self.x, -1.0), (self.p, 1.0)]
        beside = torch.cat([W[..., y], W[..., self.p]], dim=-1)
        total = torch.cat([sign * beside[..., i, :] for i, sign in signs], dim=-2)
        if self.m:
            follow = -torch.linalg.pinv(_on_free(W[..., u, u], free), hermitian=True) @ (
                free[..., None] * beside[..., u, :]
            )
            total = total + torch.cat([sign * W[..., i, u] for i, sign in signs], dim=-2) @ follow
        return total[..., : 2 * self.n], total[..., 2 * self.n :]


def _on_free(A: Tensor, free: Tensor) -> Tensor:
    """A matrix on the free entries, the identity on the others; zero where it is no number, which LAPACK refuses."""
    return (free[..., None] * A * free[..., None, :] + torch.diag_embed(1 - free)).nan_to_num(0.0, 0.0, 0.0)
