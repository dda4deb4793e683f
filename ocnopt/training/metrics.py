"""Figures that are read off the metrics of training runs.

The loss of a single batch is noisy, so every figure uses its mean over the last W iterations: one epoch, where the run
is that long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def last_loss(metrics: Metrics, window: int) -> float:
    """The mean loss over the last W iterations.

    Args:
        metrics: of one run.
        window: W; all lines where there are fewer.
    """
    losses = [record["loss"] for record in metrics]
    return float(smooth(losses, min(window, len(losses)))[-1])


def reaches(metrics: Metrics, target: float, window: int) -> tuple[int, float] | None:
    """Iteration and training time at which the mean over W iterations first meets a target; None if it never does.

    Args:
        metrics: of one run.
        target: a loss.
        window: W.

    Example:
        >>> lines = [{"loss": loss, "iteration": i + 1, "seconds": i + 1.0} for i, loss in enumerate([4.0, 2.0, 0.0])]
        >>> reaches(lines, 3.0, 2)
        (2, 2.0)
    """
    for record, loss in zip(metrics, smooth([record["loss"] for record in metrics], window), strict=True):
        if loss <= target:
            return record["iteration"], record["seconds"]
    return None


def tested(metrics: Metrics) -> list[str]:
    """The names of the metrics of the test part.

    Args:
        metrics: of one run.
    """
    return list({key: None for record in metrics for key in record if key.startswith("test_")})


def metric_title(name: str) -> str:
    """A metric for readers, with its unit.

    Args:
        name: in a line of metrics.

    Example:
        >>> metric_title("test_accuracy"), metric_title("test_squared_error")
        ('test accuracy %', 'test squared error')
    """
    return name.replace("_", " ") + (" %" if name.endswith("accuracy") else "")


def metric_scale(name: str) -> int:
    """What a metric is multiplied by for readers.

    Args:
        name: in a line of metrics.
    """
    return 100 if name.endswith("accuracy") else 1
