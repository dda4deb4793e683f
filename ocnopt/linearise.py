r"""The one linearisation: first and second derivatives of functions of a point or along a path, by plain autograd.

Two kinds of function are differentiated, and neither is ever mapped over samples (it may capture per-sample data and
use autograd inside):

* a function of w ``(..., d)`` that accepts extra leading axes (:func:`derivatives`, for control steps): its outputs
  become replicas on one leading axis, so that one reverse pass gives every row of every Jacobian;
* a function of X ``(*batch, d)`` and of the static control p ``(q,)`` that all samples share (:func:`linearise`,
  :func:`quadratic`, for continuous time), evaluated once at the batch's own shape. X belongs to a sample, so one
  reverse pass differentiates all samples at once; a derivative in p keeps them apart in one of two ways: functions that
  accept p with leading axes get a copy of p per sample (:func:`leaves`), and p behaves as X does; for others p stays
  shared, and what is wanted in p comes entry by entry, q cotangents each for all samples.

Directions are never replicas: they are cotangents of one batched reverse pass (:func:`pull`), some at a time.

**Control steps** (:func:`expand_path`). With w = (x, u) of size d = n + m, a step's dynamics f and cost l expand to f_w
(n, d), l_w (d), l_ww (d, d). They are kept in homogeneous coordinates (1, dw), where the gap g of an infeasible path is
one more column and a quadratic function one symmetric matrix:

    F = [1  0  ]  (1 + n, 1 + d)        L = [0    l_w^T]  (1 + d, 1 + d),   cost change = 1/2 (1, dw) L (1, dw)^T
        [g  f_w]                            [l_w  l_ww ]

Exact curvature needs f_ww only as c . f_ww, for a vector c that the backward sweep finds on its way. Either all of f_ww
``(N, n, d, d)`` is computed beforehand, which takes few calls, or c . f_ww alone at each step, which takes n times
less arithmetic and memory: the larger of the two costs decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.errors import ProblemError
from ocnopt.paths import Path, Widened, step_numbers

# Cotangents in one batched reverse pass, and the numbers in them: more gains no speed, and memory grows with both.
_AT_ONCE, _NUMBERS = 128, 1_000_000
# Beyond this many points in one evaluation a CPU gets slower per point (caches), and memory grows: cut along the steps.
_POINTS = 100_000
# Second derivatives of a step, all at once, as long as that many points cost less than one more call for each step.
_FEW = 1_500


def flat(v: Tensor) -> Tensor:
    """``(..., k)`` as ``(M, k)``, k = 0 included."""
    return v.reshape(math.prod(v.shape[:-1]), v.shape[-1])


def _grad(y: Tensor, inputs: Sequence[Tensor], columns: Tensor | None = None, **options: bool) -> tuple[Any, ...]:
    """torch.autograd.grad, which may meet an operation without a second derivative."""
    try:
        return torch.autograd.grad(y, inputs, columns, allow_unused=True, **options)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise ProblemError(
            f"dynamics or cost hold an operation that torch cannot differentiate twice ({error}); expected those that "
            "it can: write it out, as (x - y).square().sum(-1).sqrt() for cdist or (x / 6 + 0.5).clamp(0, 1) for "
            'hardsigmoid, or ask oc.differentiate for curvature="gauss_newton", which takes one derivative of dynamics'
        ) from error


def gradient(y: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradient of the sum of y; zeros where y does not depend on an input."""
    if not y.requires_grad:
        return [torch.zeros_like(v) for v in inputs]
    return list(_grad(y.sum(), inputs, create_graph=create_graph, materialize_grads=True))


def pull(y: Tensor, inputs: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """Vector-Jacobian products of one column, shaped like y, or of R in front; the graph stays, R stays in front."""
    lead = columns.shape[: columns.ndim - y.ndim]
    parts = []
    if y.requires_grad and 0 not in lead:
        parts = [
            _grad(y, inputs, some, is_grads_batched=bool(lead), retain_graph=True)
            for some in (columns.split(_at_once(y)) if lead else (columns,))
        ]
    products = zip(*parts, strict=True) if parts else [(None,)] * len(inputs)
    return [_joined(some, v, lead) for some, v in zip(products, inputs, strict=True)]


def _joined(parts: Sequence[Tensor | None], v: Tensor, lead: Sequence[int]) -> Tensor:
    """Parts of R products as one tensor, zeros where there are none."""
    found = [part for part in parts if part is not None]
    if not found:
        return v.new_zeros((*lead, *v.shape))
    return found[0] if len(found) == 1 else torch.cat(found)


def _at_once(y: Tensor) -> int:
    return max(1, min(_AT_ONCE, _NUMBERS // max(1, y.numel())))


def unit_rows(k: int, like: Tensor, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """The identity ``(k, k)`` in blocks of rows: k may be the number of parameters, and the whole too large to hold."""
    for start in range(0, k, at_once):
        place = slice(start, min(start + at_once, k))
        rows = like.new_zeros(place.stop - start, k)
        rows[:, place].fill_diagonal_(1.0)
        yield place, rows


def fixed_direction(p: Tensor) -> Tensor:
    """A fixed direction of length one, for witnesses."""
    r = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (r / r.norm().clamp(min=1e-30)).to(p)


def jacobian(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of y ``(..., k)``, for each input ``(..., j)`` as ``(..., k, j)``.

    y has the samples' axes, or none where it is a sum over the samples.
    """
    k, axes = y.shape[-1], (1,) * (y.ndim - 1)
    parts = [
        pull(y, inputs, rows.reshape(-1, *axes, k).expand(-1, *y.shape))
        for _, rows in unit_rows(k, y.detach(), _at_once(y))
    ]
    blocks = zip(*parts, strict=True) if parts else [()] * len(inputs)
    return [_joined(some, v, (k,)).movedim(0, -2) for some, v in zip(blocks, inputs, strict=True)]


def derivatives(
    function: Callable[[Tensor], Tensor], w: Tensor, o: int, *, hessian: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(..., o)``, Jacobian ``(..., o, d)`` and Hessian ``(..., o, d, d)`` of a function of w ``(..., d)``.

    The function accepts leading axes: ``(*extra, ..., d) -> (*extra, ..., o)``. Without ``hessian`` the third result is
    empty. A function that does not depend on w has zero derivatives.
    """
    with torch.enable_grad():
        point = w.detach().expand(o, *w.shape).clone().requires_grad_()
        output = function(point)
        (rows,) = gradient(torch.diagonal(output, dim1=0, dim2=-1), (point,), create_graph=hessian)
        second = jacobian(rows, (point,))[0].movedim(0, -3) if hessian else rows.new_zeros(0)
    return output[0].detach(), rows.detach().movedim(0, -2), second


def leaves(X: Tensor, p: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """X and p as the start of a graph."""
    if per_sample:
        p = p.expand(*X.shape[:-1], p.shape[-1]).clone()
    return X.detach().requires_grad_(), p.detach().requires_grad_()


def linearise(F: Tensor, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """F_X ``(..., n, d)`` and F_p ``(..., n, q)`` of F ``(..., n)``, which has a graph to the leaves X and p."""
    X, p = inputs
    if p.ndim == X.ndim:
        return jacobian(F, inputs)
    # F_p^T y is linear in y: its derivative in y is F_p^T, one entry of p a pass.
    y = torch.zeros_like(F).requires_grad_()
    (Fpy,) = gradient(F * y, (p,), create_graph=True)
    return [*jacobian(F, (X,)), jacobian(Fpy, (y,))[0].mT]


def quadratic(c: Tensor, inputs: tuple[Tensor, Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_XX ``(..., d, d)`` and c_pX ``(..., q, d)`` of c ``(...)``, and r^T c_pp r, summed over samples."""
    X, p = inputs
    gX, gp = gradient(c, inputs, create_graph=True)
    (ppr,) = pull(gp, (p,), r.expand(gp.shape))
    seen = (ppr * r).sum()
    if p.ndim == X.ndim:
        XX, Xp = jacobian(gX, inputs)
        return XX, Xp.mT, seen
    (XX,), (pX,) = jacobian(gX, (X,)), jacobian(gp, (X,))
    return XX, pX, seen


def add_curvature_in_p(total: Tensor, weight: float, c: Tensor, p: Tensor) -> None:
    """Add the weighted Hessian in the leaf p ``(q,)`` of the samples' sum of c to ``total`` ``(q, q)``, in place."""
    (gp,) = gradient(c, (p,), create_graph=True)
    for place, rows in unit_rows(len(p) if gp.requires_grad else 0, p.detach(), _AT_ONCE):
        total[place].add_(pull(gp, (p,), rows)[0], alpha=weight)


class Hessians(NamedTuple):
    """Second derivatives of a step's dynamics, f_ww ``(*lead, n, d, d)``."""

    fww: Tensor

    def times(self, c: Tensor) -> Tensor:
        """c . f_ww ``(*lead, d, d)``, for c ``(*lead, n)`` or with entries of static controls behind."""
        n, d = self.fww.shape[-3], self.fww.shape[-1]
        return (c[..., None, :n] @ self.fww.flatten(-2))[..., 0, :].unflatten(-1, (d, d))


class StepAt(NamedTuple):
    """The step ``outputs(w) -> (f, l)`` at w ``(1, *lead, d)``, for second derivatives that are not computed before."""

    outputs: Callable[[Tensor], Tensor]
    w: Tensor

    def times(self, c: Tensor) -> Tensor:
        """c . f_ww ``(*lead, d, d)``, as the second derivatives of the number c . f."""
        point = self.w.detach().requires_grad_()
        with torch.enable_grad():
            f = self.outputs(point)[..., :-1]
            (slope,) = gradient(f * c[..., : f.shape[-1]], (point,), create_graph=True)
        return jacobian(slope, (point,))[0][0]


StepCurvature = Hessians | StepAt


class StepModels(NamedTuple):
    """Models of all steps in homogeneous coordinates, and the means to find c . f_ww at each.

    F is ``(N, *lead, 1 + n, 1 + d)`` and L ``(N, *lead, 1 + d, 1 + d)``; no curvature for Gauss-Newton.
    """

    F: Tensor
    L: Tensor
    curvature: list[StepCurvature] | None


def expand_path(wide: Widened, path: Path, *, exact: bool) -> StepModels:
    """Model every step along a path.

    Args:
        wide: the problem.
        path: where f(x_k, u_k) is not x_{k+1} the model has a gap.
        exact: with the curvature of the dynamics.
    """
    n, d = wide.n - wide.q, wide.n + wide.m
    lead = path.cost.numel()
    at_once = exact and lead * n * d <= _FEW
    per_step = lead * ((n + 1) * d if at_once else max(n + 1, d))
    F: list[Tensor] = []
    L: list[Tensor] = []
    curved: list[StepCurvature] = []
    for group, start, stop in wide.stretches(max(1, _POINTS // max(1, per_step))):
        k = step_numbers(group, start, stop, path.states)
        w = torch.cat([path.states[start:stop], path.controls[start:stop]], dim=-1)
        value, slopes, hessian = derivatives(wide.outputs(group, k), w, n + 1, hessian=at_once)
        lww = (hessian if at_once else derivatives(wide.cost(group, k), w, 1, hessian=True)[2])[..., -1, :, :]
        F.append(_affine(wide, value[..., :-1] - path.states[start + 1 : stop + 1][..., :n], slopes[..., :-1, :]))
        L.append(_quadratic(slopes[..., -1, :], lww))
        for fill in range(1 + wide.n + group.stage.control_dim, 1 + d):
            # a control that only fills up: its minimum is where it stands
            L[-1][..., fill, fill] = 1.0
        if at_once:
            curved += [Hessians(fww) for fww in hessian[..., :-1, :, :].unbind(0)]
        else:
            numbers = [step_numbers(group, i, i + 1, path.states) for i in range(start, stop)]
            curved += [StepAt(wide.outputs(group, i), point[None]) for i, point in zip(numbers, w, strict=True)]
    return StepModels(torch.cat(F), torch.cat(L), curved if exact else None)


def expand_terminal(wide: Widened, z: Tensor) -> Tensor:
    """The model L ``(*lead, 1 + n, 1 + n)`` of the terminal cost at z ``(*lead, n)``."""
    _, gradient, hessian = derivatives(wide.phi, z, 1, hessian=True)
    return _quadratic(gradient[..., 0, :], hessian[..., 0, :, :])


def _affine(wide: Widened, gap: Tensor, jacobian: Tensor) -> Tensor:
    """The map (1, w) -> (1, gap + jacobian w, p)."""
    n, q, d = wide.n, wide.q, wide.n + wide.m
    F = gap.new_zeros((*gap.shape[:-1], 1 + n, 1 + d))
    F[..., 0, 0] = 1.0
    F[..., 1 : 1 + n - q, 0] = gap
    F[..., 1 : 1 + n - q, 1:] = jacobian
    F[..., 1 + n - q :, 1 + n - q : 1 + n] = torch.eye(q, dtype=gap.dtype, device=gap.device)
    return F


def _quadratic(gradient: Tensor, hessian: Tensor) -> Tensor:
    """The symmetric matrix of gradient^T w + 1/2 w^T hessian w on (1, w)."""
    L = pad(0.5 * (hessian + hessian.mT), (1, 0, 1, 0))
    L[..., 0, 1:] = gradient
    L[..., 1:, 0] = gradient
    return L
