"""Feed-forward, residual and inception networks of a size that trains in seconds.

Shapes: vectors ``(N, d)`` or images ``(N, 1, H, W)``, logits ``(N, C)``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.neural.runge_kutta_net import RungeKuttaNet

LAYERS = 15  # of a Runge-Kutta network


def mlp(
    inputs: int, outputs: int, *, layers: int = 5, width: int = 32, activation: type[nn.Module] = nn.Tanh
) -> nn.Module:
    """Linear layers with activations between them.

    Args:
        inputs: entries of a sample, of any shape.
        outputs: classes.
        layers: linear layers in all.
        width: of the hidden ones.
        activation: between them.

    Example:
        >>> [tuple(p.shape) for p in mlp(4, 3, layers=2, width=8).parameters()]
        [(8, 4), (8,), (3, 8), (3,)]
    """
    sizes = [inputs, *[width] * (layers - 1), outputs]
    stack: list[nn.Module] = [nn.Flatten()]
    for i in range(layers):
        stack += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*stack[:-1])


class Residual(nn.Module):
    """Two convolutions beside a skip: the identity, or a projection where the channels change.

    Args:
        inputs: channels.
        outputs: channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W) -> (N, outputs, H, W)``."""
        return torch.relu(self.skip(x) + self.second(torch.relu(self.first(x))))


class Inception(nn.Module):
    """Three convolutions of different reach side by side, their channels joined.

    Args:
        inputs: channels.
        branch: channels of each branch.
    """

    def __init__(self, inputs: int, branch: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(inputs, branch, kernel_size=1)
        self.middle = nn.Conv2d(inputs, branch, kernel_size=3, padding=1)
        self.far = nn.Conv2d(inputs, branch, kernel_size=5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W) -> (N, 3 branch, H, W)``."""
        return torch.relu(torch.cat([self.near(x), self.middle(x), self.far(x)], dim=1))


def residual_net(channels: int = 8, classes: int = 10) -> nn.Module:
    """A projecting and an identity block, each followed by pooling, and one linear layer; for images 8x8.

    Args:
        channels: of the blocks.
        classes: outputs.
    """
    return _image_net([Residual(1, channels), Residual(channels, channels)], channels, classes)


def inception_net(branch: int = 4, classes: int = 10) -> nn.Module:
    """Two inception blocks, each followed by pooling, and one linear layer; for images 8x8.

    Args:
        branch: channels of each of the three branches.
        classes: outputs.
    """
    return _image_net([Inception(1, branch), Inception(3 * branch, branch)], 3 * branch, classes)


def _image_net(blocks: list[nn.Module], channels: int, classes: int) -> nn.Module:
    stack = [layer for block in blocks for layer in (block, nn.MaxPool2d(2))]
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(4 * channels, classes))


class PlaneClassifier(nn.Module):
    """A Runge-Kutta network in the plane and a logistic function of its last state.

    Args:
        layers: of the network.
        options: of :class:`ocnopt.neural.runge_kutta_net.RungeKuttaNet`.
    """

    def __init__(self, layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        self.net = RungeKuttaNet(2, layers, **options)
        self.head = nn.Linear(2, 1)

    def forward(self, points: Tensor) -> Tensor:
        """The probability of class 1, ``(N, 2) -> (N,)``."""
        return torch.sigmoid(self.head(self.net(points)))[..., 0]
