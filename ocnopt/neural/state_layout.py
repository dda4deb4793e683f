"""A state of one tensor or several, as the one tensor that the solvers see."""

from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.neural.checks import check_state

State = Tensor | tuple[Tensor, ...]


class StateLayout(NamedTuple):
    """How a state travels as one tensor: a tensor as it is.

    A tuple becomes ``(batch, sum of sizes)`` where all parts share their leading axis, else ``(1, sum of sizes)``.
    """

    shapes: tuple[torch.Size, ...] | None = None
    rows: int = 1
    sizes: tuple[int, ...] = ()

    @staticmethod
    def of(state: object) -> "StateLayout":
        """Read the layout of a state; see :func:`ocnopt.neural.checks.check_state`."""
        if not isinstance(state, Tensor) or not state.is_floating_point():
            check_state(state)
        if not isinstance(state, tuple):
            return StateLayout()
        shapes = tuple(part.shape for part in state)
        leading = {shape[:1] for shape in shapes}
        together = len(leading) == 1 and leading != {torch.Size()}
        sizes = tuple((shape[1:] if together else shape).numel() for shape in shapes)
        return StateLayout(shapes, shapes[0][0] if together else 1, sizes)

    def join(self, state: State) -> Tensor:
        """A state as one tensor; one of inference mode is copied, as no graph may keep it."""
        if isinstance(state, Tensor):
            return state.clone() if state.is_inference() else state
        return torch.cat([part.reshape(self.rows, size) for part, size in zip(state, self.sizes, strict=True)], dim=1)

    def split(self, x: Tensor) -> State:
        """The inverse of :meth:`join`; an axis in front (output times) stays in front."""
        if self.shapes is None:
            return x
        parts = torch.split(x, [*self.sizes], dim=-1)
        lead = x.shape[:-2]
        return tuple(part.reshape(lead + shape) for part, shape in zip(parts, self.shapes, strict=True))
