"""Several tensors as one flat vector, for the integrator, and a norm that treats each of them by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Shapes of the blocks; ``rows`` of a block belong to different samples (1: all samples share it)."""

    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Sequence[Tensor], batch: tuple[int, ...]) -> "Packing":
        """Read the shapes off the blocks: those that start with the batch's axes belong to samples."""
        shapes = tuple(tuple(block.shape) for block in blocks)
        samples = math.prod(batch)
        return cls(shapes, tuple(samples if batch and shape[: len(batch)] == batch else 1 for shape in shapes))

    def pack(self, blocks: Sequence[Tensor]) -> Tensor:
        """One flat vector."""
        return torch.cat([block.reshape(-1) for block in blocks])

    def unpack(self, y: Tensor) -> list[Tensor]:
        """The blocks, as views."""
        parts = y.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def root_mean_squares(self, y: Tensor) -> list[Tensor]:
        """One number per sample, for each block that is not empty."""
        blocks = [block.reshape(r, -1) for block, r in zip(self.unpack(y), self.rows, strict=True) if block.numel()]
        return [torch.linalg.vector_norm(block, dim=-1) / math.sqrt(block.shape[-1]) for block in blocks]

    def norm(self, y: Tensor) -> Tensor:
        """The worst block of the worst sample: neither a large block nor easy samples hide the error of another."""
        return torch.stack([means.amax() for means in self.root_mean_squares(y)]).amax()
