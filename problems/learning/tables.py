"""Two tables of real measurements that come with scikit-learn, and the feed-forward net that is trained on them.

breast_cancer: 569 x 30, 2 classes (W. Wolberg, W. Street, O. Mangasarian, 1995); wine: 178 x 13, 3 classes (S.
Aeberhard, M. Forina, 1992); both UCI, CC BY 4.0. No file is fetched. Split: three quarters for training, stratified by
class, seed 0. Columns are standardised by mean and standard deviation of the training part.

Shapes: rows ``(N, d)`` float32, labels ``(N,)`` int64.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    data = load(name, test_size=0.25, seed=seed)
    return Task(
        name=name,
        train_inputs=data.train_rows,
        train_targets=data.train_labels,
        test_inputs=data.test_rows,
        test_targets=data.test_labels,
        make_model=partial(mlp, data.train_rows.shape[1], int(data.train_labels.max()) + 1),
        loss=nn.functional.cross_entropy,
        split=data.split,
    )


class Rows(NamedTuple):
    """A standardised table in two parts."""

    train_rows: Tensor
    train_labels: Tensor
    test_rows: Tensor
    test_labels: Tensor
    split: str


def load(name: str, *, test_size: int | float, seed: int = 0) -> Rows:
    """Read, split and standardise a table.

    Args:
        name: "breast_cancer" or "wine".
        test_size: rows kept for testing, or their share.
        seed: of the stratified split.

    Raises:
        DataError: scikit-learn is missing, or its data have another size.
    """
    rows, labels = _read(name)
    from sklearn.model_selection import train_test_split

    parts = train_test_split(rows, labels, test_size=test_size, stratify=labels, random_state=seed)
    train, test = (torch.tensor(part, dtype=torch.float64) for part in parts[:2])
    mean, deviation = train.mean(dim=0), train.std(dim=0)
    return Rows(
        train_rows=((train - mean) / deviation).float(),
        train_labels=torch.tensor(parts[2], dtype=torch.int64),
        test_rows=((test - mean) / deviation).float(),
        test_labels=torch.tensor(parts[3], dtype=torch.int64),
        split=f"{len(train)} train, {len(test)} test, stratified, seed {seed}",
    )


def scikit_learn(name: str) -> Any:
    """The module of data sets.

    Args:
        name: of the problem that needs it.

    Raises:
        DataError: it is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"{name} needs scikit-learn, expected but not found: pip install 'ocnopt[data]'") from error
    return datasets


def _read(name: str) -> tuple[Any, Any]:
    """The raw arrays ``(N, d)`` and ``(N,)``."""
    rows, labels = getattr(scikit_learn(name), f"load_{name}")(return_X_y=True)
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
