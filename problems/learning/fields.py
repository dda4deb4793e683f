"""Fields of Neural ODEs: layers of vectors that do not see t, are joined with it, or are scaled and shifted by it.

Shapes: t ``()``, x ``(B, d)``.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class Still(nn.Module):
    """A field that does not see the time: linear layers with tanh between them.

    Args:
        sizes: entries before the first layer, between layers, after the last.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        stack = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
        self.net = nn.Sequential(*stack[:-1])

    def forward(self, t: Tensor, state: Any) -> Any:
        """``(B, d) -> (B, d)``; of a pair (h, gap), gap ``(B, 1)``, the flow takes gap units of time.

        A field of h alone would do with ``NeuralODE(error_norm="sample")``, which takes times ``(K, B)`` of each
        sample, here ``ode(h, gap.T)[-1]``; the pair lets a free horizon stretch all gaps.
        """
        if isinstance(state, Tensor):
            return self.net(state)
        h, gap = state
        return gap * self.net(h), torch.zeros_like(gap)


class TimeLinear(nn.Module):
    """A linear layer that sees the time as one more entry.

    Args:
        inputs: entries of a vector.
        outputs: likewise.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + 1, outputs)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """``(B, inputs) -> (B, outputs)``."""
        return self.linear(torch.cat([x, t.to(x).expand(*x.shape[:-1], 1)], dim=-1))


class Squash(nn.Module):
    """FFJORD's concat-squash layer, (W x + b) sigmoid(g t + c) + h t.

    Args:
        inputs: entries of a vector.
        outputs: likewise.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """``(B, inputs) -> (B, outputs)``."""
        time = t.to(x).reshape(1, 1)
        return self.layer(x) * torch.sigmoid(self.gate(time)) + self.shift(time)


class TimeNet(nn.Module):
    """Layers that see the time, with an activation between them.

    Args:
        layer: :class:`TimeLinear` or :class:`Squash`.
        sizes: entries before the first layer, between layers, after the last.
        activation: between them.

    Example:
        >>> TimeNet(Squash, [2, 8, 2])(torch.tensor(0.5), torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, layer: type[TimeLinear] | type[Squash], sizes: Sequence[int], activation: Activation = torch.tanh
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(*pair) for pair in pairwise(sizes))
        self.activation = activation

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """``(B, sizes[0]) -> (B, sizes[-1])``."""
        for i, layer in enumerate(self.layers):
            x = layer(t, self.activation(x) if i else x)
        return x
