"""The pictures of training runs: loss, evaluations, T and accuracy. Every function writes one PNG, returns its path."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ocnopt.runs import write_atomically
from ocnopt.solvers.plotting import finish, legend, panels, styled

Metrics = Sequence[Mapping[str, Any]]


def smooth(losses: Sequence[int | float], window: int) -> np.ndarray:
    """The mean over the last ``window`` entries; NaN before there are as many.

    Args:
        losses: one number an iteration.
        window: at least 1.

    Example:
        >>> smooth([4.0, 2.0, 0.0], 2).tolist()
        [nan, 3.0, 1.0]
    """
    values = np.full(len(losses), np.nan)
    if len(losses) >= window:
        values[window - 1 :] = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return values


def plot_loss_against_time(path: Path, runs: Mapping[str, Sequence[Metrics]], window: int) -> Path:
    """Training loss against the seconds spent on training.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
        window: iterations that a point averages over.
    """
    figure, (axis,) = panels(1)
    _loss_curves(axis, runs, window, "seconds")
    finish(axis, "training time (s)", f"training loss, mean of {window} batches" if window > 1 else "training loss")
    legend(figure, axis)
    return save(figure, path)


def plot_loss_against_iteration(path: Path, runs: Mapping[str, Sequence[Metrics]], window: int) -> Path:
    """Training loss against the iteration, above the field evaluations that each iteration took.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
        window: iterations that a point averages over.
    """
    figure, (top, bottom) = panels(2)
    _loss_curves(top, runs, window, "iteration")
    for _, seeds, look in styled(runs):
        for metrics in seeds:
            counts = smooth([record["forward"] + record["backward"] for record in metrics], window)
            bottom.plot(_column(metrics, "iteration"), counts, **look, lw=1.1, alpha=_alpha(seeds))
    bottom.set_ylim(bottom=0)
    bottom.sharex(top)
    top.tick_params(labelbottom=False)
    finish(top, "", f"training loss,\nmean of {window} batches" if window > 1 else "training loss")
    finish(bottom, "iteration", "field evaluations,\nforward + backward")
    legend(figure, top)
    return save(figure, path)


def plot_horizon(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> Path:
    """The integration time T against the iteration.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
    """
    figure, (axis,) = panels(1)
    for label, seeds, look in styled(runs):
        for i, metrics in enumerate(seeds):
            name = label if i == 0 else None
            axis.plot(
                _column(metrics, "iteration"),
                _column(metrics, "T"),
                **look,
                alpha=_alpha(seeds),
                label=name,
            )
    axis.set_ylim(bottom=0)
    finish(axis, "iteration", "integration time T")
    legend(figure, axis)
    return save(figure, path)


def plot_accuracy(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> Path:
    """Test accuracy after each epoch.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
    """
    figure, (axis,) = panels(1)
    for label, seeds, look in styled(runs):
        for i, metrics in enumerate(seeds):
            points = [(r["epoch"] + 1, 100 * r["test_accuracy"]) for r in metrics if "test_accuracy" in r]
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, **look, marker="o", ms=3, alpha=_alpha(seeds), label=label if i == 0 else None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axis, "epoch", "test accuracy (%)")
    legend(figure, axis)
    return save(figure, path)


def _loss_curves(axis: Axes, runs: Mapping[str, Sequence[Metrics]], window: int, against: str) -> None:
    for label, seeds, look in styled(runs):
        for i, metrics in enumerate(seeds):
            loss = smooth(_column(metrics, "loss"), window)
            name = label if i == 0 else None
            axis.semilogy(_column(metrics, against), loss, **look, alpha=_alpha(seeds), label=name)
    _plain_numbers(axis)
    axis.set_xlim(left=0)


def _plain_numbers(axis: Axes) -> None:
    """A logarithmic loss axis with 1, 2, 5 instead of powers of ten."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a whole.

    Args:
        figure: drawn.
        path: of the PNG.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return path


def _column(metrics: Metrics, name: str) -> list[int | float]:
    return [record[name] for record in metrics]


def _alpha(seeds: Sequence[Metrics]) -> float:
    return 1.0 if len(seeds) == 1 else 0.65
