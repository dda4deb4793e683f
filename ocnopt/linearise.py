r"""The one linearisation: first and second derivatives of functions of a point, by plain autograd.

Two kinds of function are differentiated, and neither is ever mapped over samples (it may capture per-sample data and
use autograd inside):

* a function of w ``(..., d)`` that accepts extra leading axes (:func:`derivatives`, for control steps): its outputs
  become replicas on one leading axis, so that one reverse pass gives every row of every Jacobian;
* a function of X ``(*batch, d)`` and of the static control p ``(q,)`` that all samples share (:func:`linearise`,
  :func:`quadratic`, for continuous time), evaluated once at the batch's own shape. X belongs to a sample, so one
  reverse pass differentiates all samples at once; a derivative in p keeps them apart in one of two ways: functions that
  accept p with leading axes get a copy of p per sample, and p behaves as X does (``per_sample``); for others p stays
  shared, and what is wanted in p comes entry by entry, q cotangents each for all samples.

Directions are never replicas: they are cotangents of one batched reverse pass (:func:`pull`), some at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Cotangents in one batched reverse pass, and the numbers in them: more gains no speed, and memory grows with both.
_AT_ONCE, _NUMBERS = 128, 1_000_000

Function = Callable[[Tensor, Tensor], Tensor]


class Linear(NamedTuple):
    """F ``(..., n)``, F_X ``(..., n, d)``, F_p ``(..., n, q)``."""

    value: Tensor
    X: Tensor
    p: Tensor


class Quadratic(NamedTuple):
    """Of a scalar: X ``(..., d)``, XX ``(..., d, d)``, pX ``(..., q, d)``; as sums p ``(q,)`` and the form r^T pp r."""

    X: Tensor
    p: Tensor
    XX: Tensor
    pX: Tensor
    form: Tensor


def flat(v: Tensor) -> Tensor:
    """``(..., k)`` as ``(M, k)``, k = 0 included."""
    return v.reshape(math.prod(v.shape[:-1]), v.shape[-1])


def gradient(y: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradient of the sum of y; zeros where y does not depend on an input."""
    if not y.requires_grad:
        return [torch.zeros_like(v) for v in inputs]
    return list(
        torch.autograd.grad(y.sum(), inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )


def pull(y: Tensor, inputs: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """Vector-Jacobian products of one column, shaped like y, or of K in front; the graph stays, K stays in front."""
    lead = columns.shape[: columns.ndim - y.ndim]
    zeros = [v.new_zeros((*lead, *v.shape)) for v in inputs]
    if not y.requires_grad or 0 in lead:
        return zeros
    batched, size = bool(lead), _at_once(y)
    parts = [
        torch.autograd.grad(y, inputs, some, is_grads_batched=batched, retain_graph=True, allow_unused=True)
        for some in (columns.split(size) if batched else (columns,))
    ]
    if len(parts) == 1:
        return [zero if product is None else product for zero, product in zip(zeros, parts[0], strict=True)]
    products = zip(zeros, *parts, strict=True)
    return [zero if some[0] is None else torch.cat(some) for zero, *some in products]


def _at_once(y: Tensor) -> int:
    return max(1, min(_AT_ONCE, _NUMBERS // max(1, y.numel())))


def unit_rows(k: int, like: Tensor, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """The identity ``(k, k)`` in blocks of rows: k may be the number of parameters, and the whole too large to hold."""
    for start in range(0, k, at_once):
        place = slice(start, min(start + at_once, k))
        rows = like.new_zeros(place.stop - start, k)
        rows[:, place].fill_diagonal_(1.0)
        yield place, rows


def jacobian(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of y ``(..., k)``, for each input ``(..., j)`` as ``(..., k, j)``.

    y has the samples' axes, or none where it is a sum over the samples.
    """
    k, axes = y.shape[-1], (1,) * (y.ndim - 1)
    parts = [
        pull(y, inputs, rows.reshape(-1, *axes, k).expand(-1, *y.shape))
        for _, rows in unit_rows(k, y.detach(), _at_once(y))
    ] or [[v.new_zeros((0, *v.shape)) for v in inputs]]
    return [
        (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).movedim(0, -2) for blocks in zip(*parts, strict=True)
    ]


def derivatives(function: Callable[[Tensor], Tensor], w: Tensor, *, hessian: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(..., o)``, Jacobian ``(..., o, d)`` and Hessian ``(..., o, d, d)`` of a function of w ``(..., d)``.

    The function accepts leading axes: ``(*extra, ..., d) -> (*extra, ..., o)``. Without ``hessian`` the third result is
    empty. A function that does not depend on w has zero derivatives.
    """
    with torch.no_grad():
        o = function(w).shape[-1]
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


@torch.enable_grad()
def linearise(function: Function, X: Tensor, p: Tensor, *, per_sample: bool) -> Linear:
    """Jacobians of ``function(X, p) -> (..., n)``."""
    point, q = leaves(X, p, per_sample)
    F = function(point, q)
    if per_sample:
        FX, Fp = jacobian(F, (point, q))
    else:
        (FX,) = jacobian(F, (point,))
        # F_p w is linear in its weights w: its derivative in w is F_p, one entry of p a pass.
        w = torch.zeros_like(F).requires_grad_()
        (Fpw,) = gradient(F * w, (q,), create_graph=True)
        Fp = jacobian(Fpw, (w,))[0].mT
    return Linear(F.detach(), FX, Fp)


@torch.enable_grad()
def pull_back(function: Function, X: Tensor, p: Tensor, columns: Tensor, *, per_sample: bool) -> Linear:
    """F, and the products F_X^T q_i ``(..., K, d)`` and F_p^T q_i ``(..., K, q)`` of K columns ``(..., K, n)``."""
    if not per_sample:
        F, FX, Fp = linearise(function, X, p, per_sample=False)
        return Linear(F, columns @ FX, columns @ Fp)
    point, q = leaves(X, p, True)
    F = function(point, q)
    products = pull(F, (point, q), columns.movedim(-2, 0))
    return Linear(F.detach(), *(product.movedim(0, -2) for product in products))


@torch.enable_grad()
def quadratic(function: Function, X: Tensor, p: Tensor, r: Tensor, *, per_sample: bool) -> Quadratic:
    """Gradient and second derivatives of ``function(X, p) -> (...)``, of the block pp its form in r alone."""
    point, q = leaves(X, p, per_sample)
    gX, gp = gradient(function(point, q), (point, q), create_graph=True)
    (ppr,) = pull(gp, (q,), r.expand(1, *gp.shape))
    if per_sample:
        XX, Xp = jacobian(gX, (point, q))
        pX, gp = Xp.mT, flat(gp).sum(0)
    else:
        (XX,), (pX,) = jacobian(gX, (point,)), jacobian(gp, (point,))
    return Quadratic(gX.detach(), gp.detach(), XX, pX, (ppr * r).sum())


@torch.enable_grad()
def add_curvature_in_p(total: Tensor, weight: float, function: Function, X: Tensor, p: Tensor) -> None:
    """Add the weighted Hessian in p of the samples' sum of ``function(X, p)`` to ``total`` ``(q, q)``, in place."""
    p = p.detach().requires_grad_()
    (gp,) = gradient(function(X.detach(), p), (p,), create_graph=True)
    for place, rows in unit_rows(len(p) if gp.requires_grad else 0, p.detach(), _AT_ONCE):
        total[place].add_(pull(gp, (p,), rows)[0], alpha=weight)
