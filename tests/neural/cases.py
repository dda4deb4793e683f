"""Fields, and what the tests of Neural ODEs compare: value and gradients of one loss."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE


class Tanh(nn.Module):
    """A small network that sees the time."""

    def __init__(self, n: int = 3, hidden: int = 6) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(n + 1, hidden), nn.Linear(hidden, n)
        self.double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))))


class Coupled(nn.Module):
    """A tuple state: a vector per sample, an image-shaped part, a number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tanh(2)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, image, total = state
        dx = self.net(t, x)
        return dx, torch.sin(image) * total[:, None, None], (dx * x).sum(-1)


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, t: Tensor, x: Any) -> Any:
        return self.function(t, x)


def start(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def loss(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return sum(torch.sin(part + 0.3).pow(2).sum() for part in parts)


def gradients(ode: NeuralODE, x: Any, times: Any = None, extra: Any = ()) -> tuple[Any, Tensor]:
    """Output, and the gradient for the initial state, the parameters and ``extra`` as one vector."""
    parts = [part.detach().clone().requires_grad_() for part in (x if isinstance(x, tuple) else (x,))]
    wanted = [*parts, *(p for p in ode.parameters() if p.requires_grad), *extra]
    output = ode(tuple(parts) if isinstance(x, tuple) else parts[0], times)
    found = torch.autograd.grad(loss(output), wanted, allow_unused=True)
    return output, torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted, found, strict=True)]
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the norm."""
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))


def assert_gradients_of_times(ode: NeuralODE, x: Tensor, times: Sequence[float]) -> None:
    """The gradients of output times against differences; a first output that is the start moves it, and is left out."""
    moving = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(ode(x, moving)), moving)
    eps = 1e-5
    for i in range(times[0] in (0.0, 1.0), len(times)):
        shift = torch.zeros(len(times), dtype=torch.float64)
        shift[i] = eps
        plus, minus = (loss(ode(x, (moving + sign * shift).detach())).detach() for sign in (1, -1))
        assert float((plus - minus) / (2 * eps)) == pytest.approx(float(gradient[i]), rel=1e-6, abs=1e-8)
