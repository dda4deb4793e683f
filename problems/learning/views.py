"""Pictures of trained flows, classifiers around a Neural ODE and latent ODEs; each function returns a figure.

Vectors of more than two entries are shown on the two directions in which the given data vary most.
"""

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from ocnopt.neural.cnf import CNF
from ocnopt.solvers.plotting import COLOURS, finish, panels

CELLS, SHOWN = 120, 2_000
LINES, CLASSES = 12, 10  # of each class; of a picture


def principal(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and the two directions of largest variance ``(D, 2)``; the axes themselves where D is 2.

    Args:
        data: ``(N, D)``.
    """
    if data.shape[1] <= 2:
        return torch.zeros_like(data[0]), torch.eye(data.shape[1], 2, dtype=data.dtype)
    mean = data.mean(dim=0)
    directions = torch.linalg.svd(data - mean, full_matrices=False).Vh[:2].T
    return mean, directions * directions.sum(dim=0).sign().nan_to_num(1)


@torch.no_grad()
def draw_samples(model: CNF, data: Tensor) -> Figure:
    """Data and samples side by side, and, in the plane, the density.

    Args:
        model: trained or not.
        data: ``(N, D)``.
    """
    data, samples = data[:SHOWN], model.sample(min(len(data), SHOWN))
    mean, directions = principal(data)
    flat = data.shape[1] == 2
    figure, axes = panels(2 + flat, columns=3)
    figure.set_size_inches(3.4 * len(axes), 3.6)
    reach = 1.4 * float(((data - mean) @ directions).abs().quantile(0.98))  # a lone point far out stays outside
    for axis, points, title in zip(axes, (data, samples), ("data", "samples"), strict=False):
        x, y = ((points - mean) @ directions).T.numpy()
        axis.scatter(x, y, s=3 if len(data) > 500 else 9, color=COLOURS[0], alpha=0.5, linewidths=0)
        axis.set_title(title)
    if flat:
        line = torch.linspace(-reach, reach, CELLS, dtype=data.dtype)
        density = torch.cat([model(part) for part in torch.cartesian_prod(line, line).split(4096)]).exp()
        grid = line.numpy()
        axes[2].pcolormesh(grid, grid, density.reshape(CELLS, CELLS).T.numpy(), cmap="viridis", shading="gouraud")
        axes[2].set_title("density")
    for axis in axes:
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        finish(axis, *(("x1", "x2") if flat else ("first principal axis", "second principal axis")))
        axis.grid(visible=False)
    return figure


@torch.no_grad()
def draw_transport(model: CNF, count: int = 5) -> Figure:
    """How a flow in the plane carries points of the base to its samples.

    Args:
        model: trained or not.
        count: of the instants.
    """
    z = torch.randn(SHOWN // 2, 2)
    colours = torch.atan2(z[:, 1], z[:, 0]).numpy()
    figure, axes = panels(count, columns=count)
    figure.set_size_inches(2.2 * count, 2.6)
    times = model.times(count)
    path = model.ode(z, times)
    reach = 1.05 * float(path.abs().amax(dim=(1, 2)).max())
    for axis, t, points in zip(axes, times, path, strict=True):
        x, y = points.T.numpy()
        axis.scatter(x, y, s=3, c=colours, cmap="hsv", linewidths=0)
        axis.set(title=f"t = {t:.2f}", xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    return figure


def draw_paths(path: Tensor, classes: Tensor, lengths: Sequence[int] = ()) -> Figure:
    """The learned paths of states, coloured by class, their ends marked.

    Args:
        path: ``(L, N, D)``.
        classes: ``(N,)``; at most ten are shown.
        lengths: of each path; all of it where none are given.
    """
    last = torch.tensor(lengths or [len(path)] * len(classes)) - 1
    ends = path[last, torch.arange(len(classes))]
    mean, directions = principal(ends)
    figure, (axis,) = panels(1)
    figure.set_size_inches(7.2, 4.8)
    for label in classes.unique()[:CLASSES].tolist():
        colour = colormaps["tab10"](label % 10)
        chosen = (classes == label).nonzero()[:LINES, 0].tolist()
        lines = [((path[: int(last[i]) + 1, i] - mean) @ directions).numpy() for i in chosen]
        axis.add_collection(LineCollection(lines, lw=0.8, alpha=0.6, color=colour))
        x, y = ((ends[classes == label] - mean) @ directions).T.numpy()
        axis.scatter(x, y, s=10, color=colour, label=str(label), linewidths=0)
    finish(axis, "first principal axis of the ends", "second principal axis")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, title="class")
    return figure


@torch.no_grad()
def draw_filled(model: nn.Module, series: Tensor, unseen: Tensor, count: int = 6) -> Figure:
    """Observations, the true values between them, and what a latent ODE says.

    Args:
        model: :class:`ocnopt.problems.learning.latent.LatentOde`, trained or not.
        series: ``(N, L, 2)``, NaN where nothing was observed.
        unseen: the true values there, NaN elsewhere.
        count: of the series.
    """
    chosen = torch.linspace(0, len(series) - 1, count).long()
    values = model(series[chosen]).values
    figure, axes = panels(count, columns=3)
    for axis, seen, true, line in zip(axes, series[chosen], unseen[chosen], values, strict=True):
        _places(axis, true, "true, not observed", color=COLOURS[2], marker="x", s=14, linewidths=0.8)
        _places(axis, seen, "observed", color=COLOURS[1], s=12)
        axis.plot(*line.T.numpy(), color=COLOURS[0], lw=1.4, label="decoded")
        axis.set_aspect("equal")
        finish(axis, "x1", "x2")
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _places(axis: Axes, places: Tensor, label: str, **style: object) -> None:
    axis.scatter(*places.T.numpy(), label=label, **style)  # type: ignore[arg-type]
