"""The pictures of a run: states, controls, gains and convergence of control; loss, evaluations and T of training.

Every function writes one PNG and returns its path. Shapes: states ``(N + 1, n)``, controls ``(N, m)``, gains K
``(N, m, n)``.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ocnopt.cli.runs import write_atomically
from ocnopt.errors import ProblemError
from ocnopt.solvers.solution import Solution

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.2, 1.5)))
GREY = "#6b7480"
Metrics = Sequence[Mapping[str, Any]]
Item = TypeVar("Item")


def plot_states(path: Path, solutions: Mapping[str, Solution], labels: Sequence[str], time: str) -> Path:
    """The states over time, one panel each, all solvers on top of each other.

    Args:
        path: of the PNG.
        solutions: by solver name; one problem, no batch.
        labels: name and unit of each state.
        time: label of the time axis.
    """
    curves = {name: (_array(s.times), _array(s.states)) for name, s in solutions.items()}
    return _small_multiples(path, curves, labels, time, step=False)


def plot_controls(path: Path, solutions: Mapping[str, Solution], labels: Sequence[str], time: str) -> Path:
    """The controls over time, constant on each step, with their bounds.

    Args:
        path: of the PNG.
        solutions: by solver name; one problem, no batch.
        labels: name and unit of each control.
        time: label of the time axis.
    """
    curves = {name: (_array(s.times), _closed(_array(s.controls))) for name, s in solutions.items()}
    bounds = next(iter(solutions.values())).control_bounds
    limits = None if bounds is None else np.stack([_array(side) for side in bounds])
    return _small_multiples(path, curves, labels, time, step=True, limits=limits)


def plot_gains(path: Path, solution: Solution, states: Sequence[str], controls: Sequence[str], time: str) -> Path:
    """The feedback gains over time: one panel a control, one line a state.

    Args:
        path: of the PNG.
        solution: with gains.
        states: name and unit of each state.
        controls: name and unit of each control.
        time: label of the time axis.

    Raises:
        ProblemError: the solver has no gains.
    """
    if solution.gains is None:
        raise ProblemError("the solution has no gains; expected one of DDP")
    gains, times = _array(solution.gains.K), _array(solution.times)
    figure, axes = _panels(gains.shape[-2])
    for i, axis in enumerate(axes):
        for j in range(gains.shape[-1]):
            axis.step(
                times, _closed(gains[:, i, j]), where="post", color=COLOURS[j % 6], ls=STYLES[j % 4], label=states[j]
            )
        _finish(axis, time, f"gain on {controls[i]}" if len(controls) > i else "gain")
    _legend(figure, axes[0], gains.shape[-1])
    return _write(figure, path)


def plot_convergence(path: Path, solutions: Mapping[str, Solution]) -> Path:
    """How far the cost of each iteration is from the solver's last one.

    Args:
        path: of the PNG.
        solutions: by solver name; those without a history of the cost are left out.
    """
    figure, (axis,) = _panels(1)
    for name, solution, look in _styled(solutions):
        if "cost" not in solution.history:
            continue
        cost = _array(solution.history["cost"]).reshape(-1)
        gap = np.abs(cost - float(solution.cost)) / max(1.0, abs(float(solution.cost)))
        gap = np.where(gap > 0, gap, np.nan)
        axis.semilogy(range(len(cost)), gap, **look, marker="o", ms=3, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axis, "iteration", "distance from the final cost, relative")
    _legend(figure, axis, len(solutions))
    return _write(figure, path)


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
    figure, (axis,) = _panels(1)
    _loss_curves(axis, runs, window, "seconds")
    _finish(axis, "training time (s)", f"training loss, mean of {window} batches" if window > 1 else "training loss")
    _legend(figure, axis, len(runs))
    return _write(figure, path)


def plot_loss_against_iteration(path: Path, runs: Mapping[str, Sequence[Metrics]], window: int) -> Path:
    """Training loss against the iteration, above the field evaluations that each iteration took.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
        window: iterations that a point averages over.
    """
    figure, (top, bottom) = _panels(2, columns=1)
    _loss_curves(top, runs, window, "iteration")
    for _, seeds, look in _styled(runs):
        for metrics in seeds:
            counts = smooth([record["forward"] + record["backward"] for record in metrics], window)
            bottom.plot(_column(metrics, "iteration"), counts, **look, lw=1.1, alpha=_alpha(seeds))
    bottom.set_ylim(bottom=0)
    bottom.sharex(top)
    top.tick_params(labelbottom=False)
    _finish(top, "", f"training loss,\nmean of {window} batches" if window > 1 else "training loss")
    _finish(bottom, "iteration", "field evaluations,\nforward + backward")
    _legend(figure, top, len(runs))
    return _write(figure, path)


def plot_horizon(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> Path:
    """The integration time T against the iteration.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
    """
    figure, (axis,) = _panels(1)
    for label, seeds, look in _styled(runs):
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
    _finish(axis, "iteration", "integration time T")
    _legend(figure, axis, len(runs))
    return _write(figure, path)


def plot_accuracy(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> Path:
    """Test accuracy after each epoch.

    Args:
        path: of the PNG.
        runs: label -> the metrics of each seed.
    """
    figure, (axis,) = _panels(1)
    for label, seeds, look in _styled(runs):
        for i, metrics in enumerate(seeds):
            points = [(r["epoch"] + 1, 100 * r["test_accuracy"]) for r in metrics if "test_accuracy" in r]
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, **look, marker="o", ms=3, alpha=_alpha(seeds), label=label if i == 0 else None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axis, "epoch", "test accuracy (%)")
    _legend(figure, axis, len(runs))
    return _write(figure, path)


def _loss_curves(axis: Axes, runs: Mapping[str, Sequence[Metrics]], window: int, against: str) -> None:
    for label, seeds, look in _styled(runs):
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


def _small_multiples(
    path: Path,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: Sequence[str],
    time: str,
    *,
    step: bool,
    limits: np.ndarray | None = None,
) -> Path:
    count = next(iter(curves.values()))[1].shape[-1]
    figure, axes = _panels(count)
    for i, axis in enumerate(axes):
        for name, (times, values), look in _styled(curves):
            axis.plot(times, values[:, i], **look, label=name, drawstyle="steps-post" if step else "default")
        if limits is not None:
            for limit in limits[:, i][np.isfinite(limits[:, i])]:
                axis.axhline(limit, color=GREY, lw=0.9, ls=":")
        _finish(axis, time, labels[i] if i < len(labels) else f"entry {i}")
    if len(curves) > 1:
        _legend(figure, axes[0], len(curves))
    return _write(figure, path)


def _panels(count: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    width, height = (7.2, 3.9) if columns == 1 else (9.6, 3.0)
    figure = Figure(
        figsize=(width, max(3.9, height * rows) if columns == 1 else 0.6 + height * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in grid[count:]:
        spare.remove()
    return figure, grid[:count]


def _finish(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(visible=True, color="#e3e7ec", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)


def _legend(figure: Figure, axis: Axes, count: int) -> None:
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside upper left", ncols=min(count, 4), frameon=False)


def _write(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return path


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy()


def _closed(values: np.ndarray) -> np.ndarray:
    """Repeat the last step's value at the end time, so that a step plot shows it."""
    return np.concatenate([values, values[-1:]])


def _column(metrics: Metrics, name: str) -> list[int | float]:
    return [record[name] for record in metrics]


def _styled(items: Mapping[str, Item]) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """Each item with a colour and a line style of its own."""
    for i, (name, item) in enumerate(items.items()):
        yield name, item, {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}


def _alpha(seeds: Sequence[Metrics]) -> float:
    return 1.0 if len(seeds) == 1 else 0.65
