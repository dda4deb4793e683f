"""First and second derivatives of a function at many points at once.

Functions may capture per-sample data, so they are evaluated on extra leading axes, never mapped over samples: outputs
and directions become leading axes of replicas.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def derivatives(function: Function, w: Tensor, *, hessian: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(..., o)``, Jacobian ``(..., o, d)`` and Hessian ``(..., o, d, d)`` of a function of w ``(..., d)``.

    The function accepts leading axes: ``(*extra, ..., d) -> (*extra, ..., o)``. Without ``hessian`` the third result is
    empty. A function that does not depend on w has zero derivatives.
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
    (gradient,) = torch.autograd.grad(
        rows.sum(), point, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return gradient
