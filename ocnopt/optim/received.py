"""What backward passes have left in ``.grad``, and what was done to it before the step.

A layer whose gradient was multiplied by c, by clipping or by p.grad /= 2, takes the step of the learning rate c lr: its
N = P_u^T M^-1 P_u is c times as large, and du = -c M^-1 P_u w. For the mean over passes that is exact, as there c = 1/k
stands in every costate and 1/c in S.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocnopt.differential.kronecker import present_pass
from ocnopt.differential.layers import Gradients, Scaled
from ocnopt.optim.gradient_checks import sizes

# How far, relative to its size, a gradient may be from a multiple of another: what was cut off counts as noise.
_SLACK = 1e-2


class Received:
    """Tells whether gradients are what backward passes have left, each seen at its end.

    Attributes:
        is_touched: whether they were changed between two of the passes.
    """

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._left: list[tuple[int, int]] = []
        self._last: Tensor | None = None
        self._pass = -1
        self.is_touched = False

    def begin(self) -> None:
        """A backward pass has begun; called within it."""
        present = present_pass()
        if present != self._pass:
            self._pass = present
            self.look()

    def note(self, parameters: Sequence[Tensor]) -> None:
        """A backward pass is over."""
        gradients = [parameter.grad for parameter in parameters]
        self._parameters, self._left = parameters, [*map(_mark, gradients)]
        last = next((g for g in reversed(gradients) if g is not None and g.numel()), None)
        self._last = sizes([last]) if last is not None and last.layout is torch.strided else None

    def look(self, present: Tensor | None = None) -> bool:
        """Whether gradients, now of the ``present`` sizes, were changed by now, or on their way into ``.grad``."""
        if present is not None and self._last is not None and not torch.equal(present[-1:], self._last):
            self.is_touched = True  # by p.grad.data, whose writes are not counted; one speaks for all
        if self._left != [_mark(parameter.grad) for parameter in self._parameters]:
            self.is_touched = True
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters):
            self.is_touched = True
        return self.is_touched


def _mark(gradient: Tensor | None) -> tuple[int, int]:
    """Changes with the gradient."""
    return (0, 0) if gradient is None else (id(gradient), gradient._version)


def factor(gradients: Gradients, received: Sequence[Tensor], coarse: float) -> float | None:
    """c >= 0 of a gradient that is c times the sum over its samples; None where there is none.

    ``coarse`` is the rounding of the costates.
    """
    one, *_ = received
    totals = gradients.add_weighted(one.new_ones(len(gradients)), [torch.zeros_like(g) for g in received])
    recorded, found = (torch.cat([t.double().flatten() for t in parts]) for parts in (totals, received))
    size = float(recorded @ recorded)
    c = float(recorded @ found) / size if size else 0.0
    coarse = max(coarse, torch.finfo(one.dtype).eps)
    spread = float(Scaled(1.0).squares(gradients).double().sum()) * len(gradients)  # of sums that nearly cancel
    slack = max(_SLACK, 16 * coarse) * float(found.norm()) + 64 * coarse * abs(c) * spread**0.5
    if not c >= 0.0 or float((found - c * recorded).norm()) > slack:
        return None
    return 1.0 if abs(c - 1.0) < 1e-6 else c
