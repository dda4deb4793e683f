"""Classify digit images by a convolutional Neural ODE: a field on feature maps, SNOpt, accuracy on images left out.

python examples/classify_images.py [ITERATIONS]
"""

import sys

import torch
from torch import Tensor, nn

import ocnopt as oc


class Field(nn.Module):
    """Two convolutions; the time is one more channel of the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt, of the shape of x, (N, C, H, W)."""
        time = t.to(x).expand(len(x), 1, *x.shape[2:])
        return self.second(torch.relu(self.first(torch.cat([time, x], dim=1))))


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    data = oc.problems.get("digits").build()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        oc.NeuralODE(Field(16)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    optimizer = oc.SNOpt(model)
    for i in range(iterations):
        images, labels = data.batch(i, size=128, seed=0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if i % 20 == 0 or i == iterations - 1:
            print(f"iteration {i + 1}: loss {loss.item():.4f}, {model[1].statistics.forward} evaluations forwards")
    with torch.no_grad():
        right = model(data.test_inputs).argmax(dim=1) == data.test_targets
    print(f"test accuracy {100 * right.float().mean():.1f} %")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
