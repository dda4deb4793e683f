"""A plain torch loop around a field that torch.compile has compiled.

    python examples/compiled_field.py [ITERATIONS] [BACKEND]

The adjoint's node of autograd stays outside what is compiled; the solver calls the compiled field at every stage.
"""

import sys
from time import perf_counter

import torch
from torch import Tensor, nn

import ocnopt as oc


class Field(nn.Module):
    """Two layers that see the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width + 1, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt, (N, width)."""
        return self.second(torch.tanh(self.first(torch.cat([x, t.to(x).expand(len(x), 1)], dim=1))))


def train(field: nn.Module, iterations: int) -> list[float]:
    """The losses of a run with this field."""
    data = oc.problems.get("digits").build()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), oc.NeuralODE(field), nn.Linear(32, 10))
    optimizer = oc.SNOpt(model)
    losses = []
    for i in range(iterations):
        images, labels = data.batch(i, size=128, seed=0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(iterations: int = 60, backend: str = "inductor") -> None:
    for name in ("as written", "compiled"):
        torch.manual_seed(0)
        field: nn.Module = Field(32)
        began = perf_counter()
        losses = train(torch.compile(field, backend=backend) if name == "compiled" else field, iterations)
        print(f"{name}: loss {losses[0]:.5f} -> {losses[-1]:.5f} in {perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
