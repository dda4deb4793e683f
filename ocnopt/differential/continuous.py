r"""The second-order adjoint in continuous time, all matrices at once.

Q, the cost from time t on, has at X = (x, u) and p the derivatives Q_X (d), Q_p (q), Q_XX (d, d), Q_pX (q, d) and
Q_pp (q, q), d = n + m. At the end they are those of Phi. Backward in time, with a the first n entries of Q_X, S the
first n rows of Q_XX and R the first n columns of Q_pX,

    -dQ_X/dt  = l_X  + F_X^T a
    -dQ_p/dt  = l_p  + F_p^T a
    -dQ_XX/dt = C_XX + F_X^T S + S^T F_X
    -dQ_pX/dt = C_pX + F_p^T S + R F_X
    -dQ_pp/dt = C_pp + F_p^T R^T + R F_p

where C is l + a . F for exact curvature (second derivatives of F contracted over its outputs) and l alone for
Gauss-Newton. What belongs to a sample is kept per sample; Q_p and Q_pp are sums over the samples.

Q_pp is far larger than the rest, and nothing on the way reads it. So it stays outside the integrated state: its
integral is summed over the stages of the accepted steps. One number stands for it under step control, its quadratic
form in a fixed direction r.

Source: SNOpt, arXiv 2109.14158, Theorem 1 (Gauss-Newton); the terms a . F_xx, a . F_px, a . F_pp make it the Hessian.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.differential.flow import Flow
from ocnopt.differential.path import Path, Piece, Readout, backward, walk_back
from ocnopt.linearise import Function, flat


class Matrices(NamedTuple):
    """Per sample Q_X ``(..., d)``, Q_XX ``(..., d, d)``, Q_pX ``(..., q, d)``; as sums Q_p ``(q,)``, r^T Q_pp r, Q_pp.

    ``half`` ``(q, q)`` plus its transpose is Q_pp; it belongs to the pass and grows in place.
    """

    X: Tensor
    XX: Tensor
    pX: Tensor
    p: Tensor
    form: Tensor
    half: Tensor

    @property
    def pp(self) -> Tensor:
        """Q_pp ``(q, q)``."""
        return self.half + self.half.mT

    def row_of_pp(self, i: int) -> Tensor:
        """One row of Q_pp."""
        return self.half[i] + self.half[:, i]

    def widen(self, m: int) -> "Matrices":
        """Q does not depend on the control of an interval that is yet to come."""
        return self._replace(X=pad(self.X, (0, m)), XX=pad(self.XX, (0, m, 0, m)), pX=pad(self.pX, (0, m)))

    def narrow(self, n: int) -> tuple["Matrices", Readout]:
        """Read the control's derivatives and drop them."""
        readout = Readout(self.X[..., n:], self.XX[..., n:, n:], self.XX[..., n:, :n])
        return self._replace(X=self.X[..., :n], XX=self.XX[..., :n, :n], pX=self.pX[..., :n]), readout


def by_matrices(flow: Flow, path: Path, *, exact: bool) -> tuple[Matrices, list[Readout]]:
    """Q's derivatives at the start of the path, and those in the control of every interval."""
    # The costliest pass: its own steps need less accuracy than the path that it runs along.
    flow = replace(flow, rtol=10 * flow.rtol, atol=10 * flow.atol)
    adjoint = _SecondOrderAdjoint(flow, exact, _direction(flow.p))
    terminal = adjoint.terminal(path.end[0])
    return backward(flow, path, terminal, widen=Matrices.widen, carry=adjoint.carry, narrow=Matrices.narrow)


def _direction(p: Tensor) -> Tensor:
    """A fixed direction of length one."""
    r = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (r / r.norm().clamp(min=1e-30)).to(p)


@dataclass(frozen=True, eq=False)
class _SecondOrderAdjoint:
    """The equations above."""

    flow: Flow
    exact: bool
    r: Tensor

    def terminal(self, x: Tensor) -> Matrices:
        """The derivatives of Phi."""
        flow, Phi, q = self.flow, self.flow.lifted.terminal_cost, len(self.flow.p)
        half = x.new_zeros(q, q)
        flow.add_curvature_in_p(half, 0.5, Phi, x)
        quadratic = flow.expand(Phi, x, self.r)
        return Matrices(quadratic.X, quadratic.XX, quadratic.pX, quadratic.p, quadratic.form, half)

    def carry(self, piece: Piece, value: Matrices) -> Matrices:
        """From the end of a piece to its start."""
        *blocks, half = value
        rates, add = partial(self._rates, piece.u), partial(self._add_pp, half, piece.u)
        X, XX, pX, p, form = walk_back(self.flow, piece, rates, blocks, on_stage=add)
        return Matrices(X, XX, pX, p, form, half)

    def _rates(
        self, u: Tensor, t: float, x: Tensor, QX: Tensor, QXX: Tensor, QpX: Tensor, Qp: Tensor, _: Tensor
    ) -> list[Tensor]:
        n, r = self.flow.n, self.r
        X, a, S, R = torch.cat([x, u], dim=-1), QX[..., :n], QXX[..., :n, :], QpX[..., :n]
        F, FX, Fp = self.flow.linearise(t, X)
        C = self.flow.expand(self._curved(t, a), X, r)
        gX, gp = C.X, C.p
        if not self.exact:
            gX = gX + (a[..., None, :] @ FX)[..., 0, :]
            gp = gp + flat((a[..., None, :] @ Fp)[..., 0, :]).sum(0)
        SFX = S.mT @ FX
        form = C.form + 2 * ((r @ R) * (Fp @ r)).sum()
        return [F, -gX, -(C.XX + SFX + SFX.mT), -(C.pX + Fp.mT @ S + R @ FX), -gp, -form]

    def _add_pp(self, half: Tensor, u: Tensor, weight: float, t: float, x: Tensor, *blocks: Tensor) -> None:
        """Add a stage's part of the integral of C_pp / 2 + R F_p."""
        n, (QX, _, QpX, *_) = self.flow.n, blocks
        X, a, R = torch.cat([x, u], dim=-1), QX[..., :n], QpX[..., :n]
        Fp = self.flow.linearise(t, X).p
        half.addmm_(R.movedim(-2, 0).flatten(1), flat(Fp), alpha=weight)
        self.flow.add_curvature_in_p(half, weight / 2, self._curved(t, a), X)

    def _curved(self, t: float, a: Tensor) -> Function:
        """C."""
        if not self.exact:
            return partial(self.flow.running_cost, t)
        return lambda X, p: self.flow.running_cost(t, X, p) + (a * self.flow.dynamics(t, X, p)).sum(-1)
