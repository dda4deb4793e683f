"""Sets of images that are read from the data folder, and the convolutional Neural ODE that classifies them.

    mnist_small     the 10,000 test images of MNIST (Y. LeCun, C. Cortes, C. Burges) at 14x14, each pixel the mean of
                    four; 8,000 train and 2,000 test, shuffled by seed 0, since its two halves differ in difficulty
    mnist           28x28, 60,000 train and 10,000 test, as published
    fashion_mnist   likewise: articles of clothing (Zalando Research, MIT licence)
    cifar10         32x32 in colour, 50,000 train and 10,000 test, as published (A. Krizhevsky, 2009), binary version
    svhn            32x32 in colour, house numbers, 73,257 train and 26,032 test, as published (Y. Netzer et al., 2011)

Shapes: images ``(N, C, H, W)`` float32, standardised by mean and standard deviation of each channel of the training
part; labels ``(N,)`` int64.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.errors import DataError
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.files import data_folder, find, read_cifar, read_idx, read_matlab
from ocnopt.problems.learning.images import FEATURES, ImageClassifier
from ocnopt.problems.record import LearningRecord, Task

Part = tuple[Tensor, Tensor]  # images (N, C, H, W) of any number, and labels (N,)
SMALL_TEST = 2_000


def small(*, seed: int = 0) -> Task:
    """The test images of MNIST at half their size.

    Args:
        seed: of the order that parts them.

    Raises:
        DataError: a file is missing or broken.
    """
    images, labels = _idx("mnist", "t10k")
    images = nn.functional.avg_pool2d(images.float(), 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [(images[part], labels[part]) for part in (order[:-SMALL_TEST], order[-SMALL_TEST:])]
    return _task("mnist_small", parts[0], parts[1], f"of the test images of MNIST, shuffled with seed {seed}")


def build(name: str) -> Task:
    """A set in its published split, the image classifier around a Neural ODE, and cross-entropy.

    Args:
        name: "mnist", "fashion_mnist", "cifar10" or "svhn".

    Raises:
        DataError: a file is missing or broken.
    """
    return _task(name, *READERS[name](), "as published")


def _idx(name: str, part: str) -> Part:
    paths = [_path(name, f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{paths[0]} holds {tuple(images.shape)} and {paths[1].name} {tuple(labels.shape)}; expected (N, 28, 28) "
            "pixels and (N,) labels: fetch both again"
        )
    return images[:, None], labels


def _both_idx(name: str) -> tuple[Part, Part]:
    return _idx(name, "train"), _idx(name, "t10k")


def _cifar() -> tuple[Part, Part]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    *batches, test = (read_cifar(_path("cifar10", f"{name}.bin")) for name in names)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return (images, labels), test


def _svhn() -> tuple[Part, Part]:
    train, test = (_house_numbers(_path("svhn", f"{part}_32x32.mat")) for part in ("train", "test"))
    return train, test


def _house_numbers(path: Path) -> Part:
    images, labels = read_matlab(path, ("X", "y"))
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or labels.numel() != images.shape[3]:
        raise DataError(
            f"{path} holds X {tuple(images.shape)} and y {tuple(labels.shape)}; expected (32, 32, 3, N) and N labels: "
            "fetch it again"
        )
    return images.permute(3, 2, 0, 1), labels.flatten() % 10  # a zero is written as 10


SOURCES = {
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. Burges)",
    "fashion_mnist": "Fashion-MNIST (Zalando Research, MIT licence)",
    "cifar10": "CIFAR-10, binary version (A. Krizhevsky, 2009)",
    "svhn": "SVHN, cropped digits (Y. Netzer et al., 2011)",
}
READERS: dict[str, Callable[[], tuple[Part, Part]]] = {
    "mnist": partial(_both_idx, "mnist"),
    "fashion_mnist": partial(_both_idx, "fashion_mnist"),
    "cifar10": _cifar,
    "svhn": _svhn,
}


def _path(dataset: str, name: str) -> Path:
    """A file below the set's own folder, or, of MNIST, in the data folder itself."""
    others = [data_folder()] if dataset == "mnist" else []
    return find(f"{dataset}/{name}", dataset=dataset, source=SOURCES[dataset], others=others)


def _task(name: str, train: Part, test: Part, how: str) -> Task:
    images = train[0].float()
    mean, deviation = (f(images.flatten(2), dim=(0, 2))[:, None, None] for f in (torch.mean, torch.std))

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        return ImageClassifier(horizon, channels=images.shape[1], **options)

    return Task(
        name=name,
        train_inputs=(images - mean) / deviation,
        train_targets=train[1].long(),
        test_inputs=(test[0].float() - mean) / deviation,
        test_targets=test[1].long(),
        make_model=make_model,
        loss=nn.functional.cross_entropy,
        split=f"{len(train[1])} train, {len(test[1])} test, {how}",
        pictures=(FEATURES,),
    )


def _record(name: str, what: str, source: str, build: Callable[..., Task], epochs: int) -> LearningRecord:
    return LearningRecord(
        name=name,
        summary=f"classify {what} with a convolutional Neural ODE",
        build=build,
        source=f"{source}, from the data folder",
        batch_size=128,
        epochs=epochs,
        learning_rates={"adam": 0.003},
    )


RECORDS = (
    _record("mnist_small", "digits 14x14", f"test part of {SOURCES['mnist']}", small, 3),
    _record("mnist", "digits 28x28", SOURCES["mnist"], partial(build, "mnist"), 1),
    _record("fashion_mnist", "clothes 28x28", SOURCES["fashion_mnist"], partial(build, "fashion_mnist"), 1),
    _record("cifar10", "colour images 32x32", SOURCES["cifar10"], partial(build, "cifar10"), 10),
    _record("svhn", "house numbers 32x32", SOURCES["svhn"], partial(build, "svhn"), 5),
)
