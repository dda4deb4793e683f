"""Train a Neural ODE on digit images in an ordinary loop, with SNOpt in the place of Adam."""

import torch
from torch import Tensor, nn

import ocnopt as oc


class Field(nn.Module):
    """The right-hand side of dx/dt = F(t, x): any module that takes a time and a state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 48), nn.Tanh(), nn.Linear(48, width))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        return self.net(x)


def main() -> None:
    torch.manual_seed(0)
    data = oc.problems.get("digits").build()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), oc.NeuralODE(Field(32), horizon=1.0), nn.Linear(32, 10))

    # optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer = oc.SNOpt(model)

    for epoch in range(5):
        total = 0.0
        batches = torch.randperm(len(data.train_targets)).split(128)
        for batch in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        with torch.no_grad():
            right = model(data.test_inputs).argmax(dim=1) == data.test_targets
        print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}, test accuracy {100 * right.float().mean():.1f} %")


if __name__ == "__main__":
    main()
