"""What backward passes have left in ``.grad``, and what was done to it before the step.

A layer whose gradient was multiplied by c, by clipping or by p.grad /= 2, takes the step of the learning rate c lr: its
N = P_u^T M^-1 P_u is c times as large, and du = -c M^-1 P_u w. For the mean over passes that is exact, as there c = 1/k
stands in every costate and 1/c in S.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ocnopt.differential.layers import Gradients, Scaled
from ocnopt.optim.checks import sizes

Mark = tuple[Tensor, int, int]
# How far, relative to its size, a gradient may be from a multiple of another: what was cut off counts as noise.
_SLACK = 1e-2


class Received:
    """Tells whether gradients are what backward passes have left, each seen at its end.

    Attributes:
        is_touched: whether they were changed between two of the passes.
    """

    def __init__(self) -> None:
        self._left: list[Mark] = []
        self._pass = -1
        self._sizes: Tensor | None = None
        self.is_touched = False

    def begin(self) -> None:
        """A backward pass has begun; called within it."""
        present = torch._C._current_graph_task_id()
        if present != self._pass:
            self._pass = present
            self.look()

    def note(self, parameters: Iterable[Tensor]) -> None:
        """A backward pass is over."""
        self._left = [mark(parameter) for parameter in parameters]
        found = [p.grad for p, _, _ in self._left if p.grad is not None and p.numel()]
        self._sizes = sizes(found) if all(g.layout is torch.strided for g in found) else None

    def look(self, present: Tensor | None = None) -> bool:
        """Whether gradients, now of the ``present`` sizes, were changed by now, or on their way into ``.grad``."""
        if present is not None and self._sizes is not None and not torch.equal(present, self._sizes):
            self.is_touched = True  # by p.grad.data, whose writes are not counted
        self.is_touched = self.is_touched or any(
            mark(seen[0]) != seen or seen[0]._backward_hooks or seen[0]._post_accumulate_grad_hooks
            for seen in self._left
        )
        return self.is_touched


def mark(parameter: Tensor) -> Mark:
    """Changes with the gradient of a parameter."""
    gradient = parameter.grad
    return (parameter, 0, 0) if gradient is None else (parameter, id(gradient), gradient._version)


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
