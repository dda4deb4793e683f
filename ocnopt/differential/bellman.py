r"""The Bellman sweep: staged controls minimised out, stage by stage, from the end.

A stage's model in w = (x, u) and the cost-to-go V' = (V'_x, V'_xx) at its end give, with the gap g = f - x_{k+1} of an infeasible path,

    V'_x <- V'_x + V'_xx g
    Q_w  = l_w  + f_w^T V'_x             Q_ww = l_ww + f_w^T V'_xx f_w  (+ V'_x . f_ww, exact curvature)
    k, K = argmin over du in the box of  Q_u^T du + 1/2 du^T (Q_uu + mu I) du  and its derivative -(Q_uu + mu I)^-1 Q_ux
    V_x  = Q_x + K^T Q_uu k + K^T Q_u + Q_ux^T k        V_xx = Q_xx + K^T Q_uu K + K^T Q_ux + Q_ux^T K

(the general form: k, K may be regularised or clamped). Under a step of size alpha (alpha g, alpha k, K) the cost changes by
alpha * linear + alpha^2 * quadratic. V_x holds second-order terms (of g and k), so the linear part needs the plain gradient J_x under the
feedback beside it:  J_x = l_x + f_x^T J'_x + K^T (l_u + f_u^T J'_x),  linear = sum g^T J'_x + k^T (l_u + f_u^T J'_x).  Static controls are part of the state here, so they need no line of their own until
the first stage, where :func:`minimise_start` chooses them.

Shapes, all with the batch in front: f_w (n', d), V_xx (n, n), k (m), K (m, n); mu has the batch shape. Source: Tassa, Mansard and Todorov,
"Control-limited differential dynamic programming", ICRA 2014; Mastalli et al., "Crocoddyl", ICRA 2020 (gaps).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.differential.box import minimise_box
from ocnopt.expansion import StageModel, TerminalModel


class BellmanStage(NamedTuple):
    """What one step of the sweep needs: the model, the gap at the stage's end and how far u may still move."""

    model: StageModel
    gap: Tensor | None
    room: Bounds | None


class CostToGo(NamedTuple):
    """V_x, V_xx, J_x; predicted change of cost; ``solvable`` is False once a Q_uu was not positive definite."""

    x: Tensor
    xx: Tensor
    jx: Tensor
    linear: Tensor
    quadratic: Tensor
    solvable: Tensor


class StageGains(NamedTuple):
    """du = k + K dx, and J_x at the stage's start: the costate where the path is optimal."""

    k: Tensor
    K: Tensor
    costate: Tensor


def terminal_value(model: TerminalModel) -> CostToGo:
    """V at the end of the path."""
    zero = torch.zeros_like(model.value)
    return CostToGo(model.x, model.xx, model.x, zero, zero, torch.ones_like(zero, dtype=torch.bool))


def bellman_step(stage: BellmanStage, value: CostToGo, mu: Tensor) -> tuple[CostToGo, StageGains]:
    """Carry V over one stage and read out its gains."""
    model, gap, room = stage
    Vx, Vxx, Jx, linear, quadratic, solvable = value
    total = linear + quadratic
    if gap is not None:
        shift = _times(Vxx, gap)
        linear = linear + (Jx * gap).sum(-1)
        total = total + ((Vx + 0.5 * shift) * gap).sum(-1)
        Vx = Vx + shift
    both = model.lw[..., None] + model.fw.mT @ torch.stack([Vx, Jx], dim=-1)
    Qww = model.lww + model.fw.mT @ Vxx @ model.fw
    if model.fww is not None:
        Qww = Qww + (Vx[..., None, :] @ model.fww.flatten(-2)).reshape(Qww.shape)
    n = model.n
    Qx, Qu, Ju = both[..., :n, 0], both[..., n:, 0], both[..., n:, 1]
    Qxx, Qux, Quu = Qww[..., :n, :n], Qww[..., n:, :n], Qww[..., n:, n:]
    k, K, fine = minimise_box(_regularised(Quu, mu), Qu, Qux, room)
    Quuk = _times(Quu, k)
    Vx = Qx + _times(K.mT, Quuk + Qu) + _times(Qux.mT, k)
    cross = K.mT @ Qux
    Vxx = Qxx + K.mT @ Quu @ K + cross + cross.mT
    linear = linear + (k * Ju).sum(-1)
    total = total + (k * (Qu + 0.5 * Quuk)).sum(-1)
    Jx = both[..., :n, 1] + _times(K.mT, Ju)
    return CostToGo(Vx, 0.5 * (Vxx + Vxx.mT), Jx, linear, total - linear, solvable & fine), StageGains(k, K, Jx)


def minimise_start(value: CostToGo, q: int, mu: Tensor, room: Bounds | None) -> tuple[Tensor, CostToGo]:
    """Choose the static controls: minimise V over the last q entries of the first state, whose other entries are fixed."""
    Vp, Vpp = value.x[..., -q:], value.xx[..., -q:, -q:]
    none = Vpp.new_zeros((*Vpp.shape[:-1], 0))
    dp, _, fine = minimise_box(_regularised(Vpp, mu), Vp, none, room)
    linear = value.linear + (dp * value.jx[..., -q:]).sum(-1)
    total = value.linear + value.quadratic + (dp * (Vp + 0.5 * _times(Vpp, dp))).sum(-1)
    return dp, value._replace(linear=linear, quadratic=total - linear, solvable=value.solvable & fine)


def _regularised(H: Tensor, mu: Tensor) -> Tensor:
    return H + mu[..., None, None] * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
