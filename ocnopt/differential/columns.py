r"""Columns: derivatives of the cost-to-go that travel as its gradient does.

A column q is carried backward in time by

    -dq/dt = F_X^T q,   and gathers   integral of F_p^T q dt

The costate is one column, with the gradient in p as its quadrature: the continuous adjoint of a network, and without a
running cost the gradient of any problem. Without a running cost the Gauss-Newton matrices, too, keep the rank of the
terminal Hessian: with Phi's Hessian in (x, p) split into sum_i s_i y_i y_i^T, a column goes out from each y_i = (q_i,
p_i), p_i gathers, and

    Q_XX = sum_i s_i q_i q_i^T,    Q_pX = sum_i s_i p_i q_i^T,    Q_pp = sum_i s_i p_i p_i^T

The gradient (Q_X, Q_p) is one more column, the first, with weight 0 in these sums. Shapes: q_i ``(*batch, R, d)``,
p_i ``(*batch, R, q)``, weights s_i ``(*batch, R)``; one column alone has no axis R.

Each column's witness is one number, the product of what it gathers with a fixed direction.

Source: SNOpt, arXiv 2109.14158, Proposition 2 (with F_p^T q_i where (11), (12) print F_u^T p_i).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.differential.flow import Flow, Pulled
from ocnopt.differential.stretches import Gather, Readout
from ocnopt.errors import ProblemError
from ocnopt.integrate.runge_kutta import Time
from ocnopt.linearise import fixed_direction, flat, gradient, jacobian


@runtime_checkable
class Pullable(Protocol):
    """A field, of a problem or of a network."""

    def pull(self, t: Time, x: Tensor, columns: Tensor, /, *, wanted: bool) -> Pulled:
        """Evaluate once and pull columns back, to the parameters, as one tensor, only if they are ``wanted``."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns q in units of ``unit``, p_i which gathers in place, what its witness has seen, s_i.

    Of a problem p_i is ``(..., R, q)``; of a network it is one vector ``(q,)``, a sum over the samples. The witness is
    p_i . r, and where ``seen`` is empty nobody asks for it.
    """

    integrated: ClassVar[tuple[str, ...]] = ("q", "seen")
    q: Tensor
    in_p: Tensor
    r: Tensor
    seen: Tensor
    weights: Tensor
    unit: float = 1.0

    @property
    def X(self) -> Tensor:
        """Q_X ``(..., d)``."""
        return self.q[..., 0, :]

    @property
    def p(self) -> Tensor:
        """Q_p ``(q,)``, summed over the samples."""
        return flat(self.in_p[..., 0, :]).sum(0)

    @property
    def XX(self) -> Tensor:
        """Q_XX ``(..., d, d)``."""
        return self.q.mT @ self._weighted(self.q)

    @property
    def pX(self) -> Tensor:
        """Q_pX ``(..., q, d)``."""
        return self.in_p.mT @ self._weighted(self.q)

    @property
    def pp(self) -> Tensor:
        """Q_pp ``(q, q)``, summed over the samples."""
        return flat(self.in_p).mT @ flat(self._weighted(self.in_p))

    def row_of_pp(self, i: int) -> Tensor:
        """One row of Q_pp."""
        return (self.in_p[..., i] * self.weights).reshape(-1) @ flat(self.in_p)

    def _weighted(self, columns: Tensor) -> Tensor:
        return columns * self.weights[..., None]

    def widen(self, m: int) -> "Columns":
        """Entries for u."""
        return replace(self, q=pad(self.q, (0, m)))

    def narrow(self, n: int) -> tuple["Columns", Readout | None]:
        """Those of x."""
        XX = self.XX
        return replace(self, q=self.q[..., :n]), Readout(self.X[..., n:], XX[..., n:, n:], XX[..., n:, :n])

    def rates(self, field: Pullable, t: Time, x: Tensor, q: Tensor, *, wanted: bool) -> tuple[Sequence[Tensor], Gather]:
        """The equation above."""
        F, FXq, Fpq = field.pull(t, x, q, wanted=wanted)
        # The witness is that of -p_i.
        turn = torch.zeros_like(self.seen) if Fpq is None or not self.seen.numel() else (Fpq @ self.r).to(self.seen)

        def gather(weight: float) -> None:
            if Fpq is not None:
                self.in_p.add_(Fpq, alpha=weight * self.unit)

        return [F, -FXq, turn], gather


def columns_of(flow: Flow, q: Tensor, in_p: Tensor, weights: Tensor) -> Columns:
    """Columns of a problem that start with q and p_i, the latter's to keep."""
    return Columns(q, in_p, fixed_direction(flow.p), q.new_zeros(q.shape[:-1]), weights)


@torch.enable_grad()
def _terminal(flow: Flow, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """The leaves, Phi's gradient with its graph, and the parameters in which Phi_pp v, Phi_px v do not vanish."""
    inputs = flow.leaves(x)
    gx, gp = gradient(flow.lifted.terminal_cost(*inputs), inputs, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vx, vp = (torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in inputs)
    _, product = gradient((gx * vx).sum() + (gp * vp).sum(), inputs, create_graph=True)
    return inputs, gx, gp, flat(product.detach()).ne(0).any(0).nonzero()[:, 0]


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
    q = torch.cat([gx.detach()[..., None, :], y[..., : flow.n]], dim=-2)
    in_p = q.new_zeros((*q.shape[:-1], len(flow.p)))
    in_p[..., 0, :] = gp.detach()
    in_p[..., 1:, read] = y[..., flow.n :]
    return columns_of(flow, q, in_p, pad(signs, (1, 0)))


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
