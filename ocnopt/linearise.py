r"""The one linearisation: first and second derivatives of functions of a point, by plain autograd.

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
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Cotangents in one batched reverse pass, and the numbers in them: more gains no speed, and memory grows with both.
_AT_ONCE, _NUMBERS = 128, 1_000_000


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
    parts = []
    if y.requires_grad and 0 not in lead:
        parts = [
            torch.autograd.grad(y, inputs, some, is_grads_batched=bool(lead), retain_graph=True, allow_unused=True)
            for some in (columns.split(_at_once(y)) if lead else (columns,))
        ]
    products = zip(*parts, strict=True) if parts else [(None,)] * len(inputs)
    return [_joined(some, v, lead) for some, v in zip(products, inputs, strict=True)]


def _joined(parts: Sequence[Tensor | None], v: Tensor, lead: Sequence[int]) -> Tensor:
    """Parts of K products as one tensor, zeros where there are none."""
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


def direction(p: Tensor) -> Tensor:
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


def linearise(F: Tensor, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """F_X ``(..., n, d)`` and F_p ``(..., n, q)`` of F ``(..., n)``, which has a graph to the leaves X and p."""
    X, p = inputs
    if p.ndim == X.ndim:
        return jacobian(F, inputs)
    # F_p w is linear in its weights w: its derivative in w is F_p, one entry of p a pass.
    w = torch.zeros_like(F).requires_grad_()
    (Fpw,) = gradient(F * w, (p,), create_graph=True)
    return [*jacobian(F, (X,)), jacobian(Fpw, (w,))[0].mT]


def quadratic(c: Tensor, inputs: tuple[Tensor, Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_XX ``(..., d, d)`` and c_pX ``(..., q, d)`` of c ``(...)``, and the form r^T c_pp r, summed over samples."""
    X, p = inputs
    gX, gp = gradient(c, inputs, create_graph=True)
    (ppr,) = pull(gp, (p,), r.expand(gp.shape))
    form = (ppr * r).sum()
    if p.ndim == X.ndim:
        XX, Xp = jacobian(gX, inputs)
        return XX, Xp.mT, form
    (XX,), (pX,) = jacobian(gX, (X,)), jacobian(gp, (X,))
    return XX, pX, form


def add_curvature_in_p(total: Tensor, weight: float, c: Tensor, p: Tensor) -> None:
    """Add the weighted Hessian in the leaf p ``(q,)`` of the samples' sum of c to ``total`` ``(q, q)``, in place."""
    (gp,) = gradient(c, (p,), create_graph=True)
    for place, rows in unit_rows(len(p) if gp.requires_grad else 0, p.detach(), _AT_ONCE):
        total[place].add_(pull(gp, (p,), rows)[0], alpha=weight)
