r"""Local models of a discrete problem along a path: first and second derivatives of every stage at once.

With w = (x, u) of size d = n + m, a stage's dynamics f and cost l expand to f_w (n', d), l_w (d), l_ww (d, d) and, for
exact curvature, f_ww (n', d, d). They are kept in homogeneous coordinates (1, dw), where the gap g = f(x_k, u_k) -
x_{k+1} of an infeasible path is one more column and a quadratic function is one symmetric matrix:

    F = [1  0  ]  (1 + n', 1 + d)        L = [0    l_w^T]  (1 + d, 1 + d),   cost change = 1/2 (1, dw) L (1, dw)^T
        [g  f_w]                             [l_w  l_ww ]

All carry the batch axes in front.

How: functions may capture per-sample data, so all steps of a group are evaluated at once on extra leading axes, never
mapped over samples (:func:`ocnopt.linearise.derivatives`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.linearise import derivatives
from ocnopt.staged import Group, Index, StagedOCP

# Beyond this many points in one evaluation a CPU gets slower per point (caches), and memory grows: cut along the steps.
_POINTS = 100_000


class StageModel(NamedTuple):
    """A stage's model in homogeneous coordinates; n is the size of x, ``fww (n', d, d)`` is None for Gauss-Newton."""

    n: int
    F: Tensor
    L: Tensor
    fww: Tensor | None

    @property
    def fw(self) -> Tensor:
        """Jacobian of the dynamics, ``(..., n', d)``."""
        return self.F[..., 1:, 1:]

    @property
    def gap(self) -> Tensor:
        """f(x_k, u_k) - x_{k+1}, ``(..., n')``."""
        return self.F[..., 1:, 0]

    @property
    def lw(self) -> Tensor:
        """Gradient of the cost, ``(..., d)``."""
        return self.L[..., 1:, 0]

    @property
    def lww(self) -> Tensor:
        """Hessian of the cost, ``(..., d, d)``."""
        return self.L[..., 1:, 1:]


class TerminalModel(NamedTuple):
    """Phi, and its gradient and Hessian as one matrix L ``(..., 1 + n, 1 + n)``."""

    value: Tensor
    L: Tensor


def expand_path(
    problem: StagedOCP, states: Sequence[Tensor], controls: Sequence[Tensor], *, second_order: bool
) -> list[StageModel]:
    """Model every stage along a path.

    Args:
        problem: the discrete problem, static controls already part of its state.
        states: x_0..x_N, each ``(*batch, n)``; where f(x_k, u_k) is not x_{k+1} the model has a gap.
        controls: u_0..u_{N-1}, each ``(*batch, m)``.
        second_order: keep f_ww.
    """
    return [
        model for group in problem.groups for model in _expand_group(problem, group, states, controls, second_order)
    ]


def expand_terminal(problem: StagedOCP, x: Tensor) -> TerminalModel:
    """Model the terminal cost at x ``(*batch, n)``, static controls already part of x."""
    p = problem.start_parameters()
    value, gradient, hessian = derivatives(lambda w: problem.terminal(w, p)[..., None], x, hessian=True)
    return TerminalModel(value[..., 0], _quadratic(gradient[..., 0, :], hessian[..., 0, :, :]))


def _expand_group(
    problem: StagedOCP, group: Group, states: Sequence[Tensor], controls: Sequence[Tensor], second_order: bool
) -> list[StageModel]:
    n, m = states[group.start].shape[-1], group.stage.control_dim
    batch = math.prod(problem.batch_shape)
    per_step = batch * (n + 1) * ((n + m) if second_order else 1)
    length = max(1, _POINTS // max(1, per_step))
    models: list[StageModel] = []
    for start in range(group.start, group.stop, length):
        stop = min(start + length, group.stop)
        x, u = torch.stack(list(states[start:stop])), torch.stack(list(controls[start:stop]))
        k: Index = start if group.single else _index(start, stop, x)
        models += _models(problem, group, k, x, u, torch.stack(list(states[start + 1 : stop + 1])), second_order)
    return models


def _index(start: int, stop: int, x: Tensor) -> Tensor:
    """k for the leading axis of x, shaped to broadcast against ``x[..., 0]``."""
    return torch.arange(start, stop, device=x.device).reshape(-1, *(1,) * (x.ndim - 2))


def _models(
    problem: StagedOCP, group: Group, k: Index, x: Tensor, u: Tensor, after: Tensor, second_order: bool
) -> list[StageModel]:
    n, p = x.shape[-1], problem.start_parameters()

    def outputs(w: Tensor) -> Tensor:
        x_next, cost = problem.advance(group.stage, k, w[..., :n], w[..., n:], p)
        return torch.cat([x_next, cost[..., None]], dim=-1)

    w = torch.cat([x, u], dim=-1)
    value, jacobian, hessian = derivatives(outputs, w, hessian=second_order)
    if not second_order:
        hessian = derivatives(lambda w: outputs(w)[..., -1:], w, hessian=True)[2]
    F = _affine(value[..., :-1] - after, jacobian[..., :-1, :])
    L = _quadratic(jacobian[..., -1, :], hessian[..., -1, :, :])
    fww = hessian[..., :-1, :, :].unbind(0) if second_order else [None] * len(F)
    return [StageModel(n, *row) for row in zip(F.unbind(0), L.unbind(0), fww, strict=True)]


def _affine(shift: Tensor, matrix: Tensor) -> Tensor:
    """The map (1, w) -> (1, shift + matrix w)."""
    below = torch.cat([shift[..., None], matrix], dim=-1)
    top = below.new_zeros((*below.shape[:-2], 1, below.shape[-1]))
    top[..., 0] = 1.0
    return torch.cat([top, below], dim=-2)


def _quadratic(gradient: Tensor, hessian: Tensor) -> Tensor:
    """The symmetric matrix of gradient^T w + 1/2 w^T hessian w on (1, w)."""
    below = torch.cat([gradient[..., None], 0.5 * (hessian + hessian.mT)], dim=-1)
    zero = gradient.new_zeros((*gradient.shape[:-1], 1))
    return torch.cat([torch.cat([zero, gradient], dim=-1)[..., None, :], below], dim=-2)
