"""Handwritten digits that come with scikit-learn, and the models that are trained on them.

1,797 grey images 8x8 with values 0..16, 10 classes: the test part of UCI's "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998, CC BY 4.0). No file is fetched. Split: 1,437 for training and 360 for testing,
stratified by class, seed 0. Pixels are standardised by two fixed constants, (x/16 - 0.3053) / 0.3761, which are the
mean and the standard deviation of the training part to three digits.

Shapes: images ``(N, 1, 8, 8)`` float32, labels ``(N,)`` int64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.errors import DataError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.fields import TimeLinear, TimeNet
from ocnopt.problems.learning.images import FEATURES, ImageClassifier
from ocnopt.problems.learning.networks import inception_net, mlp, residual_net
from ocnopt.problems.record import LearningRecord, Picture, Task

SPLIT_SEED = 0
TEST_SIZE = 360
MEAN, DEVIATION = 0.3053, 0.3761


class Digits(NamedTuple):
    """The four tensors of the split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(*, seed: int = SPLIT_SEED, test_size: int = TEST_SIZE) -> Digits:
    """Read, split and standardise the images.

    Args:
        seed: of the stratified split.
        test_size: images kept for testing.

    Raises:
        DataError: scikit-learn is missing, or its data are not the expected 1,797 images.
        ProblemError: a test size that leaves no image of some class in one part.
    """
    images, labels = _read()
    if not 10 <= test_size <= len(images) - 10:
        raise ProblemError(
            f"test_size is {test_size!r}; expected a whole number from 10 to {len(images) - 10}: "
            "each part needs an image of every class"
        )
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(len(images)), test_size=test_size, stratify=labels, random_state=seed)
    pixels = torch.tensor((images / 16 - MEAN) / DEVIATION, dtype=torch.float32)[:, None]
    classes = torch.tensor(labels, dtype=torch.int64)
    return Digits(pixels[train], classes[train], pixels[test], classes[test])


def _read() -> tuple[Any, Any]:
    """The raw arrays ``(1797, 8, 8)`` and ``(1797,)``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn, expected but not found: pip install 'ocnopt[data]'") from error
    try:
        bunch = load_digits()
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"scikit-learn could not read its digits ({error}); expected an intact digits.csv.gz: install it again"
        ) from error
    images, labels = bunch.images, bunch.target
    if images.shape != (1797, 8, 8) or labels.shape != (1797,) or images.min() < 0 or images.max() > 16:
        raise DataError(
            f"scikit-learn's digits have shape {images.shape}, values {images.min():g}..{images.max():g} and labels "
            f"{labels.shape}; expected (1797, 8, 8), values 0..16 and (1797,): install scikit-learn again"
        )
    return images, labels


def build(*, seed: int = SPLIT_SEED, test_size: int = TEST_SIZE) -> Task:
    """Data, the image classifier around a Neural ODE, and cross-entropy."""

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        return ImageClassifier(horizon, **options)

    return _task("digits", make_model, (FEATURES,), seed=seed, test_size=test_size)


def vector_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
    """Pixels as a vector, 32 features, a Neural ODE of two layers that see the time, one linear layer.

    Args:
        horizon: of the Neural ODE.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`.
    """
    ode = NeuralODE(TimeNet(TimeLinear, (32, 64, 32)), horizon, **options)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), ode, nn.Linear(32, 10))


def _task(name: str, make_model: Callable[..., nn.Module], pictures: tuple[Picture, ...] = (), **options: Any) -> Task:
    data = load(**options)
    counts = f"{len(data.train_labels)} train, {len(data.test_labels)} test"
    return Task(
        name=name,
        train_inputs=data.train_images,
        train_targets=data.train_labels,
        test_inputs=data.test_images,
        test_targets=data.test_labels,
        make_model=make_model,
        loss=nn.functional.cross_entropy,
        split=f"{counts}, stratified, seed {options.get('seed', SPLIT_SEED)}",
        pictures=pictures,
    )


def _record(
    name: str, what: str, make_model: Callable[..., nn.Module], batch_size: int, epochs: int, **rates: float
) -> LearningRecord:
    return LearningRecord(
        name=name,
        summary=f"classify 8x8 digit images with {what}",
        build=partial(_task, name, make_model),
        source=SOURCE,
        batch_size=batch_size,
        epochs=epochs,
        learning_rates=rates,
    )


SOURCE = "scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
RECORDS = (
    LearningRecord(
        name="digits",
        summary="classify 8x8 digit images with a convolutional Neural ODE",
        build=build,
        source=SOURCE,
        batch_size=128,
        epochs=13,
        learning_rates={"adam": 0.01, "sgd": 0.05, "snopt": 0.01},
    ),
    _record("digits_ode", "a Neural ODE of two layers", vector_model, 128, 20, adam=0.01),
    _record("digits_mlp", "five linear layers and tanh", partial(mlp, 64, 10), 32, 15),
    _record(
        "digits_sigmoid",
        "ten linear layers and sigmoids, through which gradients vanish",
        partial(mlp, 64, 10, layers=10, activation=nn.Sigmoid),
        32,
        15,
    ),
    _record("digits_residual", "two residual blocks", residual_net, 32, 5),
    _record("digits_inception", "two inception blocks", inception_net, 32, 5),
)
