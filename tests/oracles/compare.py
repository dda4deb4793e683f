"""Compare numbers entry by entry and say where they differ most.

Two arrays agree where `|actual - expected| <= atol + rtol |expected|`. Shapes must be equal: a silent broadcast would
let a wrong answer pass.
"""

from typing import Any

import numpy as np
import torch


def assert_close(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 0.0) -> None:
    """Raise an AssertionError that shows the worst entry unless both agree to the tolerances.

    Args:
        actual: tensor, array or number that is tested.
        expected: tensor, array or number that is right; same shape.
        rtol: allowed error relative to the expected entry.
        atol: allowed absolute error.
    """
    ours, right = _array(actual), _array(expected)
    if ours.shape != right.shape:
        raise AssertionError(f"shapes differ: actual {ours.shape}, expected {right.shape}")
    if ours.size == 0:
        return
    with np.errstate(invalid="ignore"):
        error = np.abs(ours - right)
    # Equal infinities and NaN on both sides are agreement; NaN on one side is the worst disagreement there is.
    error = np.where((ours == right) | (np.isnan(ours) & np.isnan(right)), 0.0, np.nan_to_num(error, nan=np.inf))
    excess = error - (atol + rtol * np.nan_to_num(np.abs(right), nan=0.0, posinf=0.0))
    if np.all(excess <= 0.0):
        return
    index = tuple(int(entry) for entry in np.unravel_index(np.argmax(excess), excess.shape))
    scale = np.abs(right[index])
    relative = error[index] / scale if scale > 0.0 else np.inf
    raise AssertionError(
        f"{int(np.sum(excess > 0.0))} of {ours.size} entries differ; worst at {index}: actual {ours[index]:.17g}, "
        f"expected {right[index]:.17g}, error {error[index]:.3g} (relative {relative:.3g}); "
        f"allowed rtol {rtol:g}, atol {atol:g}; norm-wise error {relative_error(ours, right):.3g}"
    )


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest error divided by the largest expected entry (0 where both vanish)."""
    ours, right = _array(actual), _array(expected)
    if ours.shape != right.shape:
        raise AssertionError(f"shapes differ: actual {ours.shape}, expected {right.shape}")
    if ours.size == 0 or np.array_equal(ours, right):
        return 0.0
    scale = float(np.max(np.abs(right)))
    worst = float(np.max(np.abs(ours - right)))
    return worst / scale if scale > 0.0 else np.inf


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)
