"""Data sets in files: the folder that holds them, and readers of six formats. Nothing is ever unpickled.

The folder is the environment variable ``OCNOPT_DATA``, else ``data`` in the user's cache folder of ocnopt. A reader
refuses a file that is not whole: it names the file, the bytes found and the bytes expected.
"""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ocnopt.errors import DataError

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, tarfile.TarError)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CIFAR_BYTES = 1 + 3 * 32 * 32  # of an image: its class, then red, green and blue


def data_folder() -> Path:
    """Where data sets are looked for, and where ``ocnopt data fetch`` puts them."""
    if named := os.environ.get("OCNOPT_DATA"):
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("ocnopt") / "data"


def find(name: str, *, dataset: str, source: str, others: Sequence[Path] = ()) -> Path:
    """The path of a file of a data set.

    Args:
        name: of the file, below the data folder: its data set's own folder comes first.
        dataset: the name that ``ocnopt data fetch`` takes; empty where it must be brought by hand.
        source: where the file officially comes from.
        others: folders where the file may lie by itself.

    Raises:
        DataError: it is in none of the folders.
    """
    places = [data_folder() / name, *(folder / Path(name).name for folder in others)]
    for place in places:
        if place.is_file():
            return place
    cure = f"fetch it with 'ocnopt data fetch {dataset}'" if dataset else "bring it there"
    raise DataError(
        f"{Path(name).name} is missing; expected it as {' or '.join(map(str, places))}, from {source}: {cure}, or set "
        "OCNOPT_DATA to the folder that holds it"
    )


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends in .gz.

    Args:
        path: of the file.

    Raises:
        DataError: it cannot be read, or its compressed stream breaks off.
    """
    try:
        with _opened(path) as file:
            return file.read()
    except (OSError, *BROKEN) as error:
        raise _unreadable(path, error, "a whole file") from error


def _opened(path: Path) -> IO[bytes] | Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def read_idx(path: Path) -> Tensor:
    """An array in the IDX format of MNIST: two zero bytes, type, number of axes, sizes, entries, all big-endian.

    Args:
        path: of the file, with or without .gz.

    Raises:
        DataError: another format, or another number of bytes than the header says.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise DataError(
            f"{path} begins with {content[:4].hex() or 'nothing'}; expected an IDX file, 0000 and a type from 08 to "
            "0e: fetch it again"
        )
    kind, axes = np.dtype(_IDX_TYPES[content[2]]), content[3]
    header = 4 + 4 * axes
    sizes = np.frombuffer(content[4:header], ">u4").tolist() if len(content) >= header else []
    expected = header + kind.itemsize * int(np.prod(sizes)) if len(sizes) == axes else header
    if len(content) != expected:
        raise _broken(path, len(content), f"{expected} (a header of {header}, then entries of shape {tuple(sizes)})")
    array = np.frombuffer(content, kind, offset=header).reshape(sizes)
    return torch.from_numpy(array.astype(kind.newbyteorder("=")))


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 32, 32)`` and classes ``(N,)``, both uint8, of a file of the binary version of CIFAR-10.

    Args:
        path: of a batch, such as ``data_batch_1.bin``.

    Raises:
        DataError: no whole number of images, or a class beyond 9.
    """
    content = read_bytes(path)
    if not content or len(content) % _CIFAR_BYTES:
        raise _broken(path, len(content), f"a multiple of {_CIFAR_BYTES}, one class and 3 x 32 x 32 pixels an image")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _CIFAR_BYTES)
    if rows[:, 0].max() > 9:
        raise DataError(f"{path} holds the class {int(rows[:, 0].max())}; expected 0 to 9: fetch the binary version")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


class Series(NamedTuple):
    """Labelled series of different lengths: each ``(length, channels)`` float32, classes ``(N,)`` in sorted order."""

    values: list[Tensor]
    classes: Tensor


def read_series(path: Path) -> Series:
    """A file of the ``.ts`` format of the UEA archive: after @data a line a series, channels and class parted by ":".

    Args:
        path: of the file.

    Raises:
        DataError: no @data line, time stamps, or a series that breaks off or differs in its channels.
    """
    header, found, body = read_bytes(path).decode("utf-8", "replace").partition("@data")
    if not found:
        raise DataError(
            f"{path} has no line @data in its {path.stat().st_size} bytes; expected a .ts file: fetch it again"
        )
    fields = {key.lower(): rest for key, *rest in (line[1:].split() for line in header.splitlines() if line[:1] == "@")}
    if fields.get("timestamps", ["false"])[0].lower() == "true":
        raise DataError(f"{path} has time stamps; expected values on a grid: convert it")
    labels = sorted(fields.get("classlabel", [])[1:])
    values, classes = [], []
    for number, line in enumerate(filter(None, map(str.strip, body.splitlines())), start=1):
        *channels, label = line.split(":")
        try:
            rows = [np.array(channel.split(","), dtype=np.float32) for channel in channels]
            values.append(torch.from_numpy(np.stack(rows, axis=1)))
            classes.append(labels.index(label.strip()))
        except ValueError as error:
            raise DataError(
                f"series {number} of {path} ({path.stat().st_size} bytes) cannot be read ({error}); expected channels "
                f"of one length and a class of {labels}, parted by ':': fetch it again"
            ) from error
    if not values or len({series.shape[1] for series in values}) != 1:
        counts = sorted({series.shape[1] for series in values})
        raise DataError(f"{path} holds series of {counts} channels; expected the same number in all: fetch it again")
    return Series(values, torch.tensor(classes))


def read_table(path: Path, shape: tuple[int, int], *, header: int = 0, delimiter: str | None = ",") -> Tensor:
    """Numbers in rows, ``(rows, columns)`` float64.

    Args:
        path: of the file, with or without .gz.
        shape: that it must have.
        header: lines before the first row.
        delimiter: between numbers; None means blanks.

    Raises:
        DataError: another shape, or something that is no number.
    """
    content = read_bytes(path)
    try:
        table = np.loadtxt(content.decode("ascii").splitlines(), delimiter=delimiter, skiprows=header, ndmin=2)
    except ValueError as error:
        raise _unreadable(path, error, f"{shape} numbers") from error
    if table.shape != shape:
        raise DataError(
            f"{path} holds {table.shape} numbers in {len(content)} bytes; expected {shape}: it is cut off or another "
            "file, fetch it again"
        )
    return torch.from_numpy(table)


def read_arrays(path: Path, names: Sequence[str]) -> list[Tensor]:
    """Arrays of an .npz file.

    Args:
        path: of the file.
        names: of the arrays.

    Raises:
        DataError: it is cut off, lacks an array, or holds Python objects.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [torch.from_numpy(arrays[name]) for name in names]
    except (KeyError, ValueError, OSError, *BROKEN) as error:
        raise _unreadable(path, error, f"a whole .npz of numbers with {', '.join(names)}") from error


def read_matlab(path: Path, names: Sequence[str]) -> list[Tensor]:
    """Arrays of numbers of a MATLAB file up to version 7.

    Args:
        path: of the file.
        names: of the arrays.

    Raises:
        DataError: it is cut off, lacks an array, or is of another version.
    """
    from scipy.io import loadmat

    try:
        arrays = loadmat(path, variable_names=[*names])
        return [torch.from_numpy(arrays[name]) for name in names]
    except (KeyError, TypeError, ValueError, NotImplementedError, OSError, *BROKEN) as error:
        raise _unreadable(path, error, f"a whole MATLAB file with {', '.join(names)}") from error


def _unreadable(path: Path, error: Exception, expected: str) -> DataError:
    size = path.stat().st_size
    return DataError(f"{path} ({size} bytes) cannot be read ({error}); expected {expected}: fetch it again")


def _broken(path: Path, found: int, expected: str) -> DataError:
    return DataError(f"{path} holds {found} bytes; expected {expected}: it is cut off or another file, fetch it again")
