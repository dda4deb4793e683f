"""Learn the density of points in the plane by a continuous normalising flow, then sample from it.

python examples/estimate_density.py [ITERATIONS] [PICTURE]
"""

import sys

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import ocnopt as oc


class Field(nn.Module):
    """A network of the time and the point."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt, (N, 2)."""
        return self.net(torch.cat([z, t.to(z).expand(len(z), 1)], dim=1))


def main(iterations: int = 200, picture: str = "") -> None:
    torch.manual_seed(0)
    points = torch.tensor(make_moons(5000, noise=0.08, random_state=0)[0], dtype=torch.float32)
    points = (points - points.mean(0)) / points.std(0)
    train, test = points[:4500], points[4500:]

    flow = oc.CNF(Field(), 2, rtol=1e-4, atol=1e-4)  # in training Hutchinson's trace, after eval() the exact one
    optimizer = oc.SNOpt(flow)
    for i in range(iterations):
        batch = train[torch.randint(len(train), (256,))]
        optimizer.zero_grad()
        loss = -flow(batch).mean()
        loss.backward()
        optimizer.step()
        if i % 40 == 0 or i == iterations - 1:
            print(f"iteration {i + 1}: {loss.item():.3f} nats")

    flow.eval()
    with torch.no_grad():
        print(f"test: {-flow(test).mean():.3f} nats a point, {flow.bits(test).mean():.3f} bits an entry")
    if picture:
        from ocnopt.problems.learning.views import draw_samples

        draw_samples(flow, test).savefig(picture)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
