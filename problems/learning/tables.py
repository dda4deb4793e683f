"""Two tables of real measurements that come with scikit-learn, and the feed-forward net that is trained on them.

breast_cancer: 569 x 30, 2 classes (W. Wolberg, W. Street, O. Mangasarian, 1995); wine: 178 x 13, 3 classes (S.
Aeberhard, M. Forina, 1992); both UCI, CC BY 4.0. No file is fetched. Split: three quarters for training, stratified by
class, seed 0. Columns are standardised by mean and standard deviation of the training part.

Shapes: rows ``(N, d)`` float32, labels ``(N,)`` int64.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from ocnopt.errors import DataError
from ocnopt.problems.learning.networks import mlp
from ocnopt.problems.record import LearningRecord, Task

SIZES = {"breast_cancer": (569, 30), "wine": (178, 13)}


def build(name: str, *, seed: int = 0) -> Task:
    """Data, a net of five linear layers 32 wide, and cross-entropy.

    Args:
        name: "breast_cancer" or "wine".
        seed: of the split.

    Raises:
        DataError: scikit-learn is missing, or its data have another size.
    """
    rows, labels = _read(name)
    from sklearn.model_selection import train_test_split

    parts = train_test_split(rows, labels, test_size=0.25, stratify=labels, random_state=seed)
    train, test = (torch.tensor(part, dtype=torch.float64) for part in parts[:2])
    mean, deviation = train.mean(dim=0), train.std(dim=0)
    targets, test_targets = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Task(
        name=name,
        train_inputs=((train - mean) / deviation).float(),
        train_targets=targets,
        test_inputs=((test - mean) / deviation).float(),
        test_targets=test_targets,
        make_model=partial(mlp, rows.shape[1], int(labels.max()) + 1),
        loss=nn.functional.cross_entropy,
        split=f"{len(targets)} train, {len(test_targets)} test, stratified, seed {seed}",
    )


def _read(name: str) -> tuple[Any, Any]:
    """The raw arrays ``(N, d)`` and ``(N,)``."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"{name} needs scikit-learn, expected but not found: pip install 'ocnopt[data]'") from error
    rows, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    if rows.shape != SIZES[name]:
        raise DataError(
            f"scikit-learn's {name} has shape {rows.shape}; expected {SIZES[name]}: install scikit-learn again"
        )
    return rows, labels


def _record(name: str, what: str) -> LearningRecord:
    return LearningRecord(
        name=name,
        summary=f"{what} with five linear layers",
        build=partial(build, name),
        source=f"scikit-learn {name} (UCI, CC BY 4.0)",
        batch_size=32,
        epochs=15,
        learning_rates={},
    )


RECORDS = (
    _record("breast_cancer", "tell malignant from benign cells by 30 measurements"),
    _record("wine", "tell three cultivars by 13 measurements of their wine"),
)
