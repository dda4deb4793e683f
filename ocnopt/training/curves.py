"""The curves of training runs: loss, evaluations, T and metrics. Every function returns a matplotlib figure.

W is the number of iterations that a point of a curve averages over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ocnopt.solvers.plotting import finish, legend, panels, styled, whole_numbers
from ocnopt.training.metrics import Metrics, metric_scale, metric_title, smooth

Runs = Mapping[str, Sequence[Metrics]]
Points = tuple[Sequence[Any] | np.ndarray, Sequence[Any] | np.ndarray]  # x and y
_MOST_SEEDS, _MOST_LINES = 3, 9  # with a line each
_MOST_MARKERS = 30


def in_bands(runs: Runs) -> bool:
    """Whether curves are drawn as a mean over the seeds in a band, because lines would be too many.

    Args:
        runs: label -> the metrics of each seed.
    """
    counts = [len(seeds) for seeds in runs.values()]
    return max(counts) > _MOST_SEEDS or sum(counts) > _MOST_LINES


def draw_loss_against_time(runs: Runs, window: int) -> Figure:
    """Training loss against the seconds spent on training.

    Args:
        runs: label -> the metrics of each seed.
        window: W.
    """
    figure, (axis,) = panels(1)
    _loss_curves(axis, runs, window, "seconds")
    finish(axis, "training time (s)", f"training loss, mean of {window} batches" if window > 1 else "training loss")
    legend(figure, axis)
    return figure


def draw_loss_against_iteration(runs: Runs, window: int) -> Figure:
    """Training loss against the iteration, above the field evaluations of each iteration where there are any.

    Args:
        runs: label -> the metrics of each seed.
        window: W.
    """
    evaluates = "forward" in _any_line(runs)
    figure, axes = panels(2 if evaluates else 1)
    _loss_curves(axes[0], runs, window, "iteration")
    finish(axes[0], "iteration", f"training loss,\nmean of {window} batches" if window > 1 else "training loss")
    if evaluates:
        for _, seeds, look in styled(runs):
            for metrics in seeds:
                counts = smooth([record["forward"] + record["backward"] for record in metrics], window)
                axes[1].plot(_column(metrics, "iteration"), counts, **look, lw=1.1, alpha=_alpha(seeds))
        axes[1].set_ylim(bottom=0)
        whole_numbers(axes[1].yaxis)
        axes[1].sharex(axes[0])
        axes[0].tick_params(labelbottom=False)
        axes[0].set_xlabel("")
        finish(axes[1], "iteration", "field evaluations,\nforward + backward")
    whole_numbers(axes[0].xaxis)
    legend(figure, axes[0])
    return figure


def draw_horizon(runs: Runs, starts: Mapping[str, float]) -> Figure:
    """The integration time T after each iteration, and before the first one.

    Args:
        runs: label -> the metrics of each seed.
        starts: label -> T before the first iteration, of those runs in which it moves.
    """
    figure, (axis,) = panels(1)
    begun = {
        label: [m and [{"iteration": 0, "T": starts.get(label, m[0]["T"])}, *m] for m in seeds]
        for label, seeds in runs.items()
    }
    _draw(axis, begun, lambda metrics: (_column(metrics, "iteration"), _column(metrics, "T")))
    axis.set_ylim(bottom=0)
    whole_numbers(axis.xaxis)
    finish(axis, "iteration", "integration time T")
    legend(figure, axis)
    return figure


def draw_metric(runs: Runs, name: str) -> Figure:
    """A metric of the test part after each epoch.

    Args:
        runs: label -> the metrics of each seed.
        name: of the metric.
    """
    figure, (axis,) = panels(1)

    def points(metrics: Metrics) -> Points:
        tested = [record for record in metrics if name in record]
        return [r["epoch"] + 1 for r in tested], [metric_scale(name) * r[name] for r in tested]

    few = max(len(points(metrics)[0]) for seeds in runs.values() for metrics in seeds) <= _MOST_MARKERS
    _draw(axis, runs, points, **({"marker": "o", "ms": 3} if few else {}))
    whole_numbers(axis.xaxis)
    finish(axis, "epoch", metric_title(name))
    legend(figure, axis)
    return figure


def draw_rates(losses: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """The final loss against the learning rate: means over the seeds, with bars from the least to the greatest.

    A learning rate at which a seed diverged has a cross at the upper edge instead.

    Args:
        losses: label -> learning rate -> the final loss of each seed, infinite where it diverged.
    """
    figure, (axis,) = panels(1)
    axis.set(xscale="log", yscale="log")
    for label, rates, look in styled(losses):
        ends = [(np.mean(v), min(v), max(v)) if np.isfinite(v).all() else (np.nan,) * 3 for v in rates.values()]
        means, least, greatest = np.array(ends).T
        bars = (means - least, greatest - means)
        axis.errorbar([*rates], means, bars, **look, marker="o", ms=4, capsize=3, label=label)
        lost = [rate for rate, mean in zip(rates, means, strict=True) if np.isnan(mean)]
        edge = axis.get_xaxis_transform()
        axis.plot(lost, [1.0] * len(lost), "x", color=look["color"], transform=edge, clip_on=False)
    plain_numbers(axis.yaxis)
    finish(axis, "learning rate", "final training loss")
    legend(figure, axis)
    return figure


def _loss_curves(axis: Axes, runs: Runs, window: int, against: str) -> None:
    _draw(axis, runs, lambda metrics: (_column(metrics, against), smooth(_column(metrics, "loss"), window)))
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    axis.set_xlim(left=0)


def _draw(axis: Axes, runs: Runs, points: Callable[[Metrics], Points], **style: Any) -> None:
    """A line for each seed, or their mean in a band from the least to the greatest, as far as all of them go."""
    for label, seeds, look in styled(runs):
        curves = [points(metrics) for metrics in seeds]
        if len(seeds) == 1 or not in_bands(runs):
            for i, curve in enumerate(curves):
                axis.plot(*curve, **look, **style, alpha=_alpha(seeds), label=label if i == 0 else None)
        else:
            length = min(len(x) for x, _ in curves)
            x, y = (np.array([part[:length] for part in parts]) for parts in zip(*curves, strict=True))
            axis.plot(x.mean(axis=0), y.mean(axis=0), **look, **style, label=label)
            axis.fill_between(x.mean(axis=0), y.min(axis=0), y.max(axis=0), color=look["color"], alpha=0.15, lw=0)


def _any_line(runs: Runs) -> Mapping[str, Any]:
    lines: Iterable[Mapping[str, Any]] = (metrics[-1] for seeds in runs.values() for metrics in seeds if metrics)
    return next(iter(lines), {})


def plain_numbers(axis: Axis) -> None:
    """A drawn logarithmic axis with 1, 2, 5, over more than three decades 1 alone, and without powers of ten.

    Args:
        axis: the x or the y of a panel.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 1e3 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _column(metrics: Metrics, name: str) -> list[int | float]:
    return [record[name] for record in metrics]


def _alpha(seeds: Sequence[Metrics]) -> float:
    return 1.0 if len(seeds) == 1 else 0.65
