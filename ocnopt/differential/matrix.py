r"""The second-order adjoint in continuous time, all second derivatives at once.

Q, the cost from time t on, has in homogeneous coordinates (1, dX), X = (x, u), the symmetric matrix V (1 + d, 1 + d),
and beside it V_p (q, 1 + d) and V_pp (q, q):

    V = [ .    Q_X^T ]        V_p = [Q_p  Q_pX]        V_pp = Q_pp
        [Q_X   Q_XX  ]

At the end they are those of Phi. With V_x the rows of V in x, whose first column is the costate a, with V_px the
columns of V_p in x, and with the generator G = [0  F_X], backward in time

    -dV/dt    = C + P + P^T,   P = G^T V_x
    -dV_p/dt  = C_p + F_p^T V_x + V_px G
    -dV_pp/dt = C_pp + F_p^T V_px^T + V_px F_p

C is the Hessian of e l in ((e, X), p) at e = 1, and for exact curvature that of e l + a . F: its border is then still
the gradient of l alone, and the Jacobian of F in (e, X) is G. What belongs to a sample is kept per sample; Q_pp
is a sum over the samples.

Q_pp is far larger than the rest, and nothing on the way reads it: it is gathered, its witness r^T Q_pp r.

Source: SNOpt, arXiv 2109.14158, Theorem 1 (Gauss-Newton); the terms a . F_xx, a . F_px, a . F_pp make it the Hessian.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.differential.flow import Flow
from ocnopt.differential.stretches import Gather, Readout
from ocnopt.linearise import add_curvature_in_p, fixed_direction, flat, linearise, quadratic


@dataclass(frozen=True, eq=False)
class Matrix:
    """V ``(..., 1 + d, 1 + d)``, V_p ``(..., q, 1 + d)``, what its witness has seen, and ``half (q, q)``.

    ``half`` plus its transpose is Q_pp; it belongs to the pass and grows in place.
    """

    integrated: ClassVar[tuple[str, ...]] = ("V", "Vp", "seen")
    V: Tensor
    Vp: Tensor
    seen: Tensor
    half: Tensor
    r: Tensor
    exact: bool

    @classmethod
    def terminal(cls, flow: Flow, x: Tensor, *, exact: bool) -> "Matrix":
        """The derivatives of Phi."""
        q, r = len(flow.p), fixed_direction(flow.p)
        half = x.new_zeros(q, q)
        with torch.enable_grad():
            W, p = flow.leaves(pad(x, (1, 0), value=1.0))
            V, Vp, seen = quadratic(W[..., 0] * flow.lifted.terminal_cost(W[..., 1:], p), (W, p), r)
            p = flow.p.clone().requires_grad_()
            add_curvature_in_p(half, 0.5, flow.lifted.terminal_cost(x, p), p)
        return cls(V, Vp, seen, half, r, exact)

    @property
    def X(self) -> Tensor:
        """Q_X ``(..., d)``."""
        return self.V[..., 1:, 0]

    @property
    def XX(self) -> Tensor:
        """Q_XX ``(..., d, d)``."""
        return self.V[..., 1:, 1:]

    @property
    def p(self) -> Tensor:
        """Q_p ``(q,)``, summed over the samples."""
        return flat(self.Vp[..., 0]).sum(0)

    @property
    def pX(self) -> Tensor:
        """Q_pX ``(..., q, d)``."""
        return self.Vp[..., 1:]

    @property
    def pp(self) -> Tensor:
        """Q_pp ``(q, q)``."""
        return self.half + self.half.mT

    def row_of_pp(self, i: int) -> Tensor:
        """One row of Q_pp."""
        return self.half[i] + self.half[:, i]

    def widen(self, m: int) -> "Matrix":
        """Rows and columns for u."""
        return replace(self, V=pad(self.V, (0, m, 0, m)), Vp=pad(self.Vp, (0, m)))

    def narrow(self, n: int) -> tuple["Matrix", Readout | None]:
        """Those of x."""
        readout = Readout(self.X[..., n:], self.XX[..., n:, n:], self.XX[..., n:, :n])
        return replace(self, V=self.V[..., : 1 + n, : 1 + n], Vp=self.Vp[..., : 1 + n]), readout

    def rates(
        self, field: Flow, t: float | Tensor, x: Tensor, V: Tensor, Vp: Tensor, *, wanted: bool
    ) -> tuple[Sequence[Tensor], Gather]:
        """The equations above."""
        moving, at, r = slice(1, 1 + field.n), pad(field.join(x), (1, 0), value=1.0), self.r
        Vx, Vpx = V[..., moving, :], Vp[..., moving]
        with torch.enable_grad():
            W, p = field.leaves(at)
            curved, F = self._curved(field, t, W, p, Vx[..., 0])
            G, Fp = linearise(F, (W, p))
            C, Cp, seen = quadratic(curved, (W, p), r)
        P = G.mT @ Vx
        seen = seen + 2 * ((r @ Vpx) * (Fp @ r)).sum()

        def gather(weight: float) -> None:
            self.half.addmm_(Vpx.movedim(-2, 0).flatten(1), flat(Fp), alpha=weight)
            if self.exact or field.has_running_cost:
                with torch.enable_grad():
                    p = field.p.clone().requires_grad_()
                    add_curvature_in_p(self.half, weight / 2, self._curved(field, t, at, p, Vx[..., 0])[0], p)

        return [F.detach(), -(C + P + P.mT), -(Cp + Fp.mT @ Vx + Vpx @ G), -seen], gather

    def _curved(self, field: Flow, t: float | Tensor, W: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """What C is the Hessian of, and F."""
        F, cost = field.dynamics(t, W[..., 1:], p), W[..., 0] * field.running_cost(t, W[..., 1:], p)
        return cost + (a * F).sum(-1) if self.exact else cost, F
