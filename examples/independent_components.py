"""Unmix four signals by an orthogonal matrix: the same contrast by three methods of structured descent.

    python examples/independent_components.py [PLOT.png]

prints the Amari distance of each unmixing to the true one, 0 for perfect, and draws the signals if a file is named.
"""

import sys

import torch
from torch import Tensor

import ocnopt as oc


def signals(count: int = 2000) -> Tensor:
    """A sine, a square wave, a sawtooth and noise with heavy tails, each of unit variance."""
    t = torch.linspace(0, 8, count, dtype=torch.float64)
    noise = torch.distributions.Laplace(0.0, 1.0).sample((count,))
    sources = torch.stack([torch.sin(7 * t), torch.sign(torch.sin(11 * t)), 2 * (1.7 * t % 1) - 1, noise])
    return (sources - sources.mean(1, keepdim=True)) / sources.std(1, keepdim=True)


def whitening(x: Tensor) -> Tensor:
    """The matrix that makes the signals uncorrelated, with unit variance."""
    values, vectors = torch.linalg.eigh(torch.cov(x))
    return values.rsqrt()[:, None] * vectors.T


def contrast(y: Tensor) -> Tensor:
    """Minus the negentropy of each signal, up to constants: how little it resembles Gaussian noise."""
    gaussian = 0.37457  # the mean of log cosh of a normal variable
    return -((y.cosh().log().mean(1) - gaussian) ** 2).sum()


def amari(product: Tensor) -> float:
    """The distance of the product unmixing @ mixing from a permutation with scales, between 0 and 1."""
    P, n = product.abs(), len(product)
    rows, columns = (P.sum(i) / P.amax(i) - 1 for i in (0, 1))
    return float((rows.sum() + columns.sum()) / (2 * n * (n - 1)))


def unmix(name: str, white: Tensor, start: Tensor) -> Tensor:
    """The orthogonal U of the lowest contrast of U @ white that a method finds."""
    U = start.clone().requires_grad_()
    if name == "Itoh-Abe":  # reads losses alone, no gradients
        optimizer = oc.optim.ItohAbe([U], lr=100.0, manifold="stiefel")
        for _ in range(15):
            optimizer.step(lambda: contrast(U @ white))
        return U.detach()
    if name == "MEC learning":
        optimizer = oc.optim.MEC([U], lr=3.0, damping=0.1)
    else:
        optimizer = oc.optim.Riemannian([U], lr=3.0, momentum=0.9, retraction="cayley")
    for _ in range(100):
        optimizer.zero_grad()
        contrast(U @ white).backward()
        optimizer.step()
    return U.detach()


def main() -> None:
    torch.manual_seed(0)
    sources = signals()
    mixing = torch.randn(4, 4, dtype=torch.float64)
    mixed = mixing @ sources
    whiten = whitening(mixed)
    start = torch.nn.init.orthogonal_(torch.empty_like(mixing))
    print(f"{'start':<14}Amari distance {amari(start @ whiten @ mixing):.4f}")
    for name in ("Riemannian", "MEC learning", "Itoh-Abe"):
        U = unmix(name, whiten @ mixed, start)
        error = (U @ U.T - torch.eye(4)).abs().max().item()
        print(f"{name:<14}Amari distance {amari(U @ whiten @ mixing):.4f}, |U U^T - I| {error:.0e}")
    if len(sys.argv) > 1:
        plot(sys.argv[1], {"sources": sources, "mixed": mixed, "unmixed": U @ whiten @ mixed})


def plot(path: str, groups: dict[str, Tensor]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 3, figsize=(10, 5), sharex=True, layout="constrained")
    for column, (name, lines) in zip(axes.T, groups.items(), strict=True):
        column[0].set_title(name)
        for ax, line in zip(column, lines, strict=True):
            ax.plot(line[:600], linewidth=0.8)
            ax.set_yticks([])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
