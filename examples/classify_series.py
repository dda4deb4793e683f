"""Classify series with missing observations by an ODE-RNN: digit images read row by row, some rows never seen.

    python examples/classify_series.py [ITERATIONS]

The state flows for one unit of time from row to row; where a row was seen, a GRU cell takes it in.
"""

import sys

import torch
from torch import Tensor, nn

import ocnopt as oc


class Field(nn.Module):
    """A field that does not see the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """dh/dt, (N, width)."""
        return self.net(h)


class OdeRnn(nn.Module):
    """Read a series, answer after its last step."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.ode = oc.NeuralODE(Field(width))
        self.cell = nn.GRUCell(channels, width)
        self.head = nn.Linear(width, classes)

    def forward(self, series: Tensor) -> Tensor:
        """(N, L, channels), NaN where nothing was seen -> (N, classes)."""
        h = series.new_zeros(len(series), self.width)
        for x in series.unbind(dim=1):
            h = self.ode(h)
            seen = ~x.isnan().any(dim=1, keepdim=True)
            h = torch.where(seen, self.cell(x.nan_to_num(), h), h)
        return self.head(h)


def main(iterations: int = 100) -> None:
    torch.manual_seed(0)
    data = oc.problems.get("digits").build()
    rows, test_rows = (images[:, 0].clone() for images in (data.train_inputs, data.test_inputs))
    for series in (rows, test_rows):
        series[torch.rand(series.shape[:2]) < 0.25] = torch.nan

    model = OdeRnn(8, 10)
    optimizer = oc.SNOpt(model)
    for i in range(iterations):
        batch = torch.randint(len(rows), (128,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(rows[batch]), data.train_targets[batch])
        loss.backward()
        optimizer.step()
        if i % 20 == 0 or i == iterations - 1:
            print(f"iteration {i + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        right = model(test_rows).argmax(dim=1) == data.test_targets
    print(f"test accuracy {100 * right.float().mean():.1f} % with a quarter of the rows missing")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
