"""Runge-Kutta networks written by hand, and small ones to test."""

import torch

from ocnopt.neural.runge_kutta_net import RungeKuttaNet

PUBLISHED = {
    "euler": ([[]], [1.0]),
    "improved_euler": ([[], [1.0]], [1 / 2, 1 / 2]),
    "kutta3": ([[], [1 / 2], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6]),
    "kutta4": ([[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
TABLEAUS = list(PUBLISHED)
FIELDS = ["standard", "gradient", "hamiltonian"]


def field(kind, A, b, y):
    s = torch.tanh(y @ A.T + b)
    if kind == "standard":
        return s
    n = A.shape[0] // 2
    eye, zero = torch.eye(n), torch.zeros(n, n)
    J = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    return -s @ A if kind == "gradient" else s @ A @ J.T


def stages(A, kind, W, b, h, x):
    points, slopes = [], []
    for row in A:
        points.append(x + h * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(x)))
        slopes.append(field(kind, W, b, points[-1]))
    return points, slopes


def by_hand(tableau, kind, weight, bias, sizes, x):
    A, weights = PUBLISHED[tableau]
    for W, b, h in zip(weight, bias, sizes, strict=True):
        _, slopes = stages(A, kind, W, b, h, x)
        x = x + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
    return x


def made(tableau="kutta4", kind="standard", step="free", width=4, layers=3, **options):
    net = RungeKuttaNet(width, layers, tableau=tableau, field=kind, step=step, **options)
    with torch.no_grad():
        net.bias.normal_()
        if step != "fixed":
            net.sizes.copy_(torch.tensor([0.7, -0.2, 0.4][:layers]))
    return net


def loss(x):
    return torch.sin(x + 0.3).square().sum()
