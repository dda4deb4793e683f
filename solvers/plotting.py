"""``Solution.plot``: states, controls, feedback gains and convergence of one problem in one figure."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def plot_path(
    times: Tensor,
    states: Tensor,
    controls: Tensor,
    feedback: Tensor | None,
    gaps: Tensor | None,
    *,
    time: str,
    path: str | Path | None,
) -> Figure:
    """Draw four panels, the problems of a batch on top of each other, and write them to ``path`` if one is given.

    Args:
        times: ``(..., N + 1)``.
        states: ``(..., N + 1, n)``.
        controls: ``(..., N, m)``.
        feedback: gains ``(..., N, m, n)``, or None.
        gaps: relative distance of the cost from the last one, ``(iterations + 1, ...)``, or None.
        time: label of the time axis.
        path: a file whose ending names the format.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _lines(panels[0, 0], times, states, [f"x{j}" for j in range(states.shape[-1])], step=False)
    _labels(panels[0, 0], "states", time)
    if controls.shape[-1] == 0:
        _empty(panels[0, 1], "this problem has no staged controls")
    else:
        held = torch.cat([controls, controls[..., -1:, :]], dim=-2)
        _lines(panels[0, 1], times, held, [f"u{j}" for j in range(controls.shape[-1])], step=True)
        _labels(panels[0, 1], "controls", time)
    if feedback is None or feedback.numel() == 0:
        _empty(panels[1, 0], "this solver returns no feedback gains")
    else:
        names = [f"K[{i},{j}]" for i in range(feedback.shape[-2]) for j in range(feedback.shape[-1])]
        _lines(panels[1, 0], times[..., :-1], feedback.flatten(-2), names, step=True)
        _labels(panels[1, 0], "feedback gains", time)
    if gaps is None:
        _empty(panels[1, 1], "no history of the cost")
    else:
        _convergence(panels[1, 1], gaps.reshape(len(gaps), -1))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _lines(axis: Axes, times: Tensor, values: Tensor, names: Sequence[str], *, step: bool) -> None:
    """One colour for each component, one line for each problem of the batch."""
    t = times.reshape(-1, times.shape[-1]).cpu().numpy()
    v = values.reshape(-1, *values.shape[-2:]).cpu().numpy()
    style = "steps-post" if step else "default"
    for j, name in enumerate(names):
        for i in range(len(v)):
            label = name if i == 0 else None
            axis.plot(t[i], v[i, :, j], color=f"C{j}", label=label, alpha=_alpha(len(v)), drawstyle=style)
    if len(names) > 1:
        axis.legend(fontsize="small")


def _convergence(axis: Axes, gaps: Tensor) -> None:
    for column in gaps.cpu().unbind(-1):
        rows = (column > 0).nonzero()[:, 0]
        axis.semilogy(
            rows.numpy(), column[rows].numpy(), marker="o", markersize=3, color="C0", alpha=_alpha(gaps.shape[-1])
        )
    _labels(axis, "distance from the final cost, relative", "iteration")


def _alpha(lines: int) -> float:
    return 1.0 if lines == 1 else 0.4


def _empty(axis: Axes, reason: str) -> None:
    axis.text(0.5, 0.5, reason, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def _labels(axis: Axes, name: str, horizontal: str) -> None:
    axis.set_xlabel(horizontal)
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
