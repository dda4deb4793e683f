"""Pictures of Runge-Kutta networks in the plane: what they predict, how they move the points, how long their steps are.

As in Benning et al., arXiv 1904.05657, figures 3 to 8. Every function returns a matplotlib figure.
"""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ocnopt.problems.learning.networks import PlaneClassifier
from ocnopt.solvers.plotting import COLOURS, finish, legend, panels, whole_numbers

# The classes in two of Okabe and Ito's colours, light where the background shows them.
POINTS = ListedColormap(["#d55e00", "#0072b2"])
SHADES, CELLS = "RdBu", 200


def draw_prediction(model: PlaneClassifier, inputs: Tensor, targets: Tensor, *, title: str = "") -> Figure:
    """The probability of class 1 over the plane, its level 1/2, and points with their classes.

    Args:
        model: trained or not.
        inputs: ``(N, 2)``.
        targets: ``(N,)``, 0 or 1.
        title: of the picture.
    """
    figure, (axis,) = panels(1)
    figure.set_size_inches(5.8, 4.6)
    figure.set_layout_engine("compressed")
    reach = 1.15 * float(inputs.abs().max())
    line = torch.linspace(-reach, reach, CELLS, dtype=inputs.dtype)
    with torch.no_grad():
        values = model(torch.cartesian_prod(line, line)).reshape(CELLS, CELLS).T.numpy()
    levels = torch.linspace(0, 1, 21).tolist()
    shades = axis.contourf(line.numpy(), line.numpy(), values, levels=levels, cmap=SHADES, alpha=0.75)
    axis.contour(line.numpy(), line.numpy(), values, levels=[0.5], colors="black", linewidths=1.0)
    _scatter(axis, inputs, targets, s=11, edgecolors="white", linewidths=0.4)
    axis.set_aspect("equal")
    finish(axis, "x1", "x2")
    axis.grid(visible=False)
    axis.set_title(title)
    figure.colorbar(shades, ax=axis, label="probability of class 1", ticks=[0, 0.25, 0.5, 0.75, 1])
    return figure


def draw_states(model: PlaneClassifier, inputs: Tensor, targets: Tensor, *, title: str = "") -> Figure:
    """The points layer by layer, and behind the last one the line that the classifier draws.

    Args:
        model: trained or not.
        inputs: ``(N, 2)``.
        targets: ``(N,)``, 0 or 1.
        title: of the picture.
    """
    with torch.no_grad():
        states = model.net.states(inputs)
    columns = 4 if len(states) <= 16 else 6
    figure, axes = panels(len(states), columns=columns)
    figure.set_size_inches(2.2 * min(columns, len(states)), 0.5 + 2.2 * -(-len(states) // columns))
    for k, (axis, x) in enumerate(zip(axes, states, strict=True)):
        _scatter(axis, x, targets, s=4, linewidths=0)
        axis.set_title("input" if k == 0 else f"after layer {k}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=3)  # many numbers take long to lay out
        axis.margins(0.08)
    _draw_line(axes[-1], model)
    figure.suptitle(title)
    return figure


def _scatter(axis: Axes, x: Tensor, targets: Tensor, **style: Any) -> None:
    axis.scatter(x[:, 0].numpy(), x[:, 1].numpy(), c=targets.numpy(), cmap=POINTS, vmin=0, vmax=1, **style)


def _draw_line(axis: Axes, model: PlaneClassifier) -> None:
    """Where the logistic function of the last state is 1/2, within what the axis shows."""
    (a, b), c = model.head.weight[0].tolist(), model.head.bias.item()
    limits = axis.get_xlim(), axis.get_ylim()
    scale = a * a + b * b
    axis.axline((-c * a / scale, -c * b / scale), (-c * a / scale - b, -c * b / scale + a), color="black", lw=1.0)
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])


def draw_step_sizes(sizes: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Step sizes over the layers, of one network or of several.

    Args:
        sizes: ``step_sizes (N,)`` by the network's name.
        title: of the picture.
    """
    figure, (axis,) = panels(1)
    width = 0.8 / len(sizes)
    for i, (name, h) in enumerate(sizes.items()):
        layers = torch.arange(1, len(h) + 1) + (i - (len(sizes) - 1) / 2) * width
        axis.bar(layers.numpy(), h.numpy(), width, color=COLOURS[i % len(COLOURS)], label=name)
    axis.axhline(0, color="black", lw=0.8)
    whole_numbers(axis.xaxis)
    finish(axis, "layer", "step size h")
    axis.set_title(title)
    legend(figure, axis)
    return figure
