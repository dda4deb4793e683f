r"""Gauss-Newton curvature by columns.

Without a running cost the Gauss-Newton matrices keep the rank of the terminal Hessian. With Phi's Hessian in (x, p)
split into sum_i s_i y_i y_i^T, each column y_i travels as the gradient does; backward in time, with X = (x, u)
of size d,

    -dq_i/dt = F_X^T q_i,    -dp_i/dt = F_p^T q_i,    (q_i, p_i)(T) = y_i
    Q_XX = sum_i s_i q_i q_i^T,    Q_pX = sum_i s_i p_i q_i^T,    Q_pp = sum_i s_i p_i p_i^T

The gradient (Q_X, Q_p) is one more column, the first, with weight 0 in these sums. Shapes: q_i ``(*batch, K, d)``,
p_i ``(*batch, K, q)``, weights s_i ``(*batch, K)``.

Source: SNOpt, arXiv 2109.14158, Proposition 2 (with F_p^T q_i where (11), (12) print F_u^T p_i).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.differential.flow import Flow
from ocnopt.differential.path import Path, Piece, Readout, backward, walk_back
from ocnopt.errors import ProblemError
from ocnopt.linearise import flat, gradient, jacobian, leaves


class Columns(NamedTuple):
    """q_i in ``in_X (..., K, d)``, p_i in ``in_p (..., K, q)``, s_i in ``weights (..., K)``; the gradient is first."""

    in_X: Tensor
    in_p: Tensor
    weights: Tensor

    @property
    def X(self) -> Tensor:
        """Q_X ``(..., d)``."""
        return self.in_X[..., 0, :]

    @property
    def p(self) -> Tensor:
        """Q_p ``(q,)``, summed over the samples."""
        return flat(self.in_p[..., 0, :]).sum(0)

    @property
    def XX(self) -> Tensor:
        """Q_XX ``(..., d, d)``."""
        return self.in_X.mT @ self._weighted(self.in_X)

    @property
    def pX(self) -> Tensor:
        """Q_pX ``(..., q, d)``."""
        return self.in_p.mT @ self._weighted(self.in_X)

    @property
    def pp(self) -> Tensor:
        """Q_pp ``(q, q)``, summed over the samples."""
        return flat(self.in_p).mT @ flat(self._weighted(self.in_p))

    def row_of_pp(self, i: int) -> Tensor:
        """One row of Q_pp."""
        return (self.in_p[..., i] * self.weights).reshape(-1) @ flat(self.in_p)

    def widen(self, m: int) -> "Columns":
        """Q does not depend on the control of an interval that is yet to come."""
        return self._replace(in_X=pad(self.in_X, (0, m)))

    def narrow(self, n: int) -> tuple["Columns", Readout]:
        """Read the control's derivatives and drop them."""
        XX = self.XX
        return self._replace(in_X=self.in_X[..., :n]), Readout(self.X[..., n:], XX[..., n:, n:], XX[..., n:, :n])

    def _weighted(self, columns: Tensor) -> Tensor:
        return columns * self.weights[..., None]


def by_columns(flow: Flow, path: Path, terminal: Columns) -> tuple[Columns, list[Readout]]:
    """The columns at the start of the path, and the derivatives in the control of every interval."""
    carry = partial(_carry, flow)
    return backward(flow, path, terminal, widen=Columns.widen, carry=carry, narrow=Columns.narrow)


def _carry(flow: Flow, piece: Piece, value: Columns) -> Columns:
    """From the end of a piece to its start."""

    def rates(t: float, x: Tensor, q: Tensor, _: Tensor) -> list[Tensor]:
        F, FXq, Fpq = flow.pull_back(t, torch.cat([x, piece.u], dim=-1), q[..., : flow.n])
        return [F, -FXq, -Fpq]

    in_X, in_p = walk_back(flow, piece, rates, value[:2])
    return Columns(in_X, in_p, value.weights)


class _Terminal(NamedTuple):
    """Phi's gradient with its graph, p per sample where possible, and which parameters its Hessian reads."""

    inputs: tuple[Tensor, Tensor]
    gx: Tensor
    gp: Tensor
    read: Tensor


@torch.enable_grad()
def _terminal(flow: Flow, x: Tensor) -> _Terminal:
    """Differentiate Phi; a parameter is read where the Hessian's product with a random vector does not vanish."""
    inputs = leaves(x, flow.p, flow.per_sample)
    gx, gp = gradient(flow.lifted.terminal_cost(*inputs), inputs, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vx, vp = (torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in inputs)
    _, product = gradient((gx * vx).sum() + (gp * vp).sum(), inputs, create_graph=True)
    return _Terminal(inputs, gx, gp, flat(product.detach()).ne(0).any(0).nonzero()[:, 0])


def columns_suffice(flow: Flow, x: Tensor) -> bool:
    """Whether few columns carry the Gauss-Newton matrices: no running cost, no more parameters in Phi than states."""
    if flow.has_running_cost:
        return False
    _, _, gp, read = _terminal(flow, x)
    return len(read) <= flow.n if flow.per_sample else not bool(gp.any())


def terminal_columns(flow: Flow, x: Tensor, rank: int | None) -> Columns:
    """The gradient of Phi and factors of its Hessian in (x, p): at most ``rank``, the largest of each sample first.

    Raises:
        ProblemError: Phi reads p, in a batch, and cannot be called with a copy of p for each sample.
    """
    inputs, gx, gp, read = _terminal(flow, x)
    if not flow.per_sample and bool(gp.any()):
        raise ProblemError(
            "terminal_cost reads the parameters or T, and the functions take parameters only as one vector (q,); "
            "low_rank expects to differentiate it sample by sample: index the last axis, p[..., i], in every function "
            "of the problem, or use representation='dense'"
        )
    Hx, Hp = jacobian(torch.cat([gx, gp[..., read]], dim=-1) if len(read) else gx, inputs)
    y, signs = _factors(torch.cat([Hx, Hp[..., read]], dim=-1) if len(read) else Hx, rank)
    in_X = torch.cat([gx.detach()[..., None, :], y[..., : flow.n]], dim=-2)
    in_p = in_X.new_zeros((*in_X.shape[:-1], len(flow.p)))
    in_p[..., 0, :] = gp.detach()
    in_p[..., 1:, read] = y[..., flow.n :]
    return Columns(in_X, in_p, pad(signs, (1, 0)))


def _factors(H: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """y ``(..., R, k)`` and signs s ``(..., R)`` with H = sum_i s_i y_i y_i^T, the largest first, null ones dropped."""
    values, vectors = torch.linalg.eigh(H)
    order = values.abs().argsort(dim=-1, descending=True)
    values, vectors = values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand(vectors.shape))
    rounding = values.abs().amax(-1, keepdim=True) * H.shape[-1] * torch.finfo(H.dtype).eps
    values = torch.where(values.abs() > rounding, values, 0.0)
    present = max(1, int((values != 0).sum(-1).amax()))
    R = present if rank is None else min(rank, present)
    return (vectors * values.abs().sqrt()[..., None, :]).mT[..., :R, :], values.sign()[..., :R]
