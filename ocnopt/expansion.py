r"""Local models of a discrete problem along a path: first and second derivatives of every stage at once.

With w = (x, u) of size d = n + m, a stage's dynamics f and cost l expand to f_w (n', d), l_w (d), l_ww (d, d) and, for exact curvature,
f_ww (n', d, d). All carry the batch axes in front.

How: functions may capture per-sample data, so they are evaluated on extra leading axes, never mapped over samples. The n' + 1 outputs and
the d directions become two leading axes of replicas; one forward pass and one or two reverse passes over all steps of a group give every
row of every Jacobian and Hessian (a replicated reverse pass was measured faster than vmap of jacrev or jacfwd).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.staged import Group, Index, StagedOCP

# Beyond this many points in one evaluation a CPU gets slower per point (caches), and memory grows: cut along the steps.
_POINTS = 100_000

Function = Callable[[Tensor], Tensor]


class StageModel(NamedTuple):
    """A stage's quadratic model: next state and cost, derivatives in w = (x, u), the size n of x; ``fww`` is None for Gauss-Newton."""

    n: int
    f: Tensor
    l: Tensor  # noqa: E741
    fw: Tensor
    lw: Tensor
    lww: Tensor
    fww: Tensor | None


class TerminalModel(NamedTuple):
    """Phi, Phi_x and Phi_xx at the end of the path."""

    value: Tensor
    x: Tensor
    xx: Tensor


def expand_path(problem: StagedOCP, states: Sequence[Tensor], controls: Sequence[Tensor], *, second_order: bool) -> list[StageModel]:
    """Model every stage along a path.

    Args:
        problem: the discrete problem, static controls already part of its state.
        states: x_0..x_N, each ``(*batch, n)``; only the first N are used.
        controls: u_0..u_{N-1}, each ``(*batch, m)``.
        second_order: keep f_ww.
    """
    return [model for group in problem.groups for model in _expand_group(problem, group, states, controls, second_order)]


def expand_terminal(problem: StagedOCP, x: Tensor) -> TerminalModel:
    """Model the terminal cost at x ``(*batch, n)``, static controls already part of x."""
    p = problem.start_parameters()
    value, gradient, hessian = derivatives(lambda w: problem.terminal(w, p)[..., None], x, hessian=True)
    return TerminalModel(value[..., 0], gradient[..., 0, :], hessian[..., 0, :, :])


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
        models += _models(problem, group, k, x, u, second_order)
    return models


def _index(start: int, stop: int, x: Tensor) -> Tensor:
    """k for the leading axis of x, shaped to broadcast against ``x[..., 0]``."""
    return torch.arange(start, stop, device=x.device).reshape(-1, *(1,) * (x.ndim - 2))


def _models(problem: StagedOCP, group: Group, k: Index, x: Tensor, u: Tensor, second_order: bool) -> list[StageModel]:
    n, p = x.shape[-1], problem.start_parameters()

    def outputs(w: Tensor) -> Tensor:
        x_next, cost = problem.advance(group.stage, k, w[..., :n], w[..., n:], p)
        return torch.cat([x_next, cost[..., None]], dim=-1)

    w = torch.cat([x, u], dim=-1)
    value, jacobian, hessian = derivatives(outputs, w, hessian=second_order)
    if not second_order:
        hessian = derivatives(lambda w: outputs(w)[..., -1:], w, hessian=True)[2]
    parts = (value[..., :-1], value[..., -1], jacobian[..., :-1, :], jacobian[..., -1, :], hessian[..., -1, :, :])
    columns = [part.unbind(0) for part in parts]
    fww = hessian[..., :-1, :, :].unbind(0) if second_order else [None] * len(columns[0])
    return [StageModel(n, *row, fww=curvature) for *row, curvature in zip(*columns, fww, strict=True)]


def derivatives(function: Function, w: Tensor, *, hessian: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(..., o)``, Jacobian ``(..., o, d)`` and Hessian ``(..., o, d, d)`` of ``function(w (*extra, ..., d)) -> (*extra, ..., o)``.

    Without ``hessian`` the third result is empty. A function that does not depend on w has zero derivatives.
    """
    d = w.shape[-1]
    with torch.no_grad():
        o = function(w).shape[-1]
    lead = (d, o) if hessian else (o,)
    with torch.enable_grad():
        point = w.detach().expand(*lead, *w.shape).clone().requires_grad_()
        output = function(point)
        rows = torch.diagonal(output, dim1=len(lead) - 1, dim2=-1)
        first = _gradient(rows, point, create_graph=hessian)
        if not hessian:
            return output[0].detach(), first.movedim(0, -2).detach(), first.new_zeros(0)
        second = _gradient(torch.diagonal(first, dim1=0, dim2=-1), point, create_graph=False)
    return output[0, 0].detach(), first[0].movedim(0, -2).detach(), second.movedim((1, 0), (-3, -2)).detach()


def _gradient(rows: Tensor, point: Tensor, *, create_graph: bool) -> Tensor:
    """Gradient of the sum of ``rows``; zeros where nothing depends on the point."""
    if not rows.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(rows.sum(), point, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return gradient
