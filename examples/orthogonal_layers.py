"""Thirty layers on digit images: plain weights, weights that start orthogonal, weights that stay orthogonal.

    python examples/orthogonal_layers.py [PLOT.png]

An orthogonal matrix passes a gradient on without changing its length. In plain layers the gradient dies out before it
reaches the first one; layers that only start orthogonal stop learning when the learning rate grows.
"""

import sys

import torch
from torch import Tensor, nn

import ocnopt as oc

LAYERS, WIDTH, EPOCHS = 30, 32, 5


def train(kind: str, lr: float) -> tuple[float, list[float]]:
    """The test accuracy, and the norm of the last gradient in each layer."""
    torch.manual_seed(0)
    data = oc.problems.get("digits").build()
    hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    layers = [module for layer in hidden for module in (layer, nn.Tanh())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *layers, nn.Linear(WIDTH, 10))

    square = [layer.weight for layer in hidden]
    others = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in square)]
    if kind == "starts orthogonal":
        for weight in square:
            nn.init.orthogonal_(weight)
    groups = [
        {"params": square, "manifold": "stiefel" if kind == "stays orthogonal" else "euclidean"},
        {"params": others, "manifold": "euclidean"},  # plain momentum
    ]
    optimizer = oc.optim.Riemannian(groups, lr, momentum=0.9)

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train_targets)).split(128):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch])
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = model(data.test_inputs).argmax(dim=1) == data.test_targets
    return right.float().mean().item(), [norm(weight.grad) for weight in square]


def norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else gradient.norm().item()


def main() -> None:
    print(f"{'layers':<20}{'lr':>6}{'test accuracy':>16}{'gradient, first / last layer':>32}")
    norms = {}
    for lr in (0.03, 0.1):
        for kind in ("plain", "starts orthogonal", "stays orthogonal"):
            accuracy, norms[f"{kind}, lr {lr}"] = train(kind, lr)
            first, *_, last = norms[f"{kind}, lr {lr}"]
            print(f"{kind:<20}{lr:>6}{100 * accuracy:>14.1f} %{first / last:>32.1e}")
    if len(sys.argv) > 1:
        plot(sys.argv[1], norms)


def plot(path: str, norms: dict[str, list[float]]) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (label, values) in enumerate(norms.items()):
        ax.semilogy(range(1, LAYERS + 1), values, label=label, color=f"C{i % 3}", linestyle="-" if i < 3 else "--")
    ax.set(xlabel="layer", ylabel="norm of the last gradient")
    ax.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
