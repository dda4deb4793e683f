"""A small image classifier around one Neural ODE, after the image models of the SNOpt paper (arXiv 2109.14158).

Shapes: images ``(N, C, H, W)``, features ``(N, 32, H/2, W/2)``, logits ``(N, 10)``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.record import Picture, Task

CHANNELS = 32


class TimeConv(nn.Module):
    """A 3x3 convolution that sees the time as one more channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + 1, channels, kernel_size=3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, C, H, W)``."""
        time = t.to(x).expand(x.shape[0], 1, *x.shape[2:])
        return self.conv(torch.cat([time, x], dim=1))


class ImageField(nn.Module):
    """The field of the Neural ODE: convolution, ReLU, convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = TimeConv(channels)
        self.second = TimeConv(channels)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt, of the shape of x."""
        return self.second(t, torch.relu(self.first(t, x)))


class ImageClassifier(nn.Module):
    """Two convolutions without bias, a Neural ODE, ReLU, mean over the image, one linear layer: 36,074 parameters.

    Args:
        horizon: of the Neural ODE; an ``oc.FreeHorizon`` lets a policy move it.
        channels: C of the images.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`, dopri5 with tolerances 1e-3 unless said otherwise.
    """

    def __init__(self, horizon: float | FreeHorizon = 1.0, *, channels: int = 1, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, CHANNELS, kernel_size=3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=4, stride=2, padding=1, bias=False),
        )
        self.ode = NeuralODE(ImageField(CHANNELS), horizon, **options)
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, 10)``."""
        features = torch.relu(self.ode(self.stem(images)))
        return self.head(features.mean(dim=(2, 3)))


@torch.no_grad()
def _draw_features(model: Any, task: Task) -> Any:
    """The mean features of test images while they flow."""
    from ocnopt.problems.learning.views import draw_paths

    horizon = model.ode.horizon
    end = float(model.ode.T) if isinstance(horizon, FreeHorizon) else horizon.t1
    times = torch.linspace(horizon.t0, end, 9, dtype=torch.float64)
    path = model.ode(model.stem(task.test_inputs[:256]), times)
    return draw_paths(path.mean(dim=(3, 4)), task.test_targets[:256])


FEATURES = Picture("features", "Mean features of test images on their way through the Neural ODE.", _draw_features)
