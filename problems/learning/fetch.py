"""Data sets that are downloaded on request from their official sources, with checksums.

A file whose checksum is published is refused if it differs. For the others the SHA-256 of the first download is kept in
``checksums.json`` of the data folder, and later ones must agree. A download that broke off goes on where it stopped;
one that fails otherwise leaves nothing behind.
"""

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ocnopt.checks import nearest
from ocnopt.errors import DataError, ProblemError
from ocnopt.problems.learning.files import BROKEN, data_folder
from ocnopt.problems.learning.series import FOLDERS
from ocnopt.runs import replace_file, write_atomically

Report = Callable[[str, int, int], None]  # file, bytes so far, bytes in all (0 where the server does not say)
CHECKSUMS, PART = "checksums.json", 1 << 16


@dataclass(frozen=True)
class Download:
    """One file of the network.

    Args:
        url: where it is.
        checksum: "md5:..." as published; empty where none is.
        members: files of an archive that are kept; without any, the file itself is.
    """

    url: str
    checksum: str = ""
    members: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it leaves in the folder of its set."""
        return self.members or (self.url.rpartition("/")[2],)


@dataclass(frozen=True)
class DataSet:
    """A data set by name.

    Args:
        name: of its folder below the data folder, and of the learning problem, or what that begins with.
        summary: one line for a table, with its terms.
        downloads: that make it whole.
    """

    name: str
    summary: str
    downloads: tuple[Download, ...]

    def missing(self) -> list[str]:
        """The files that are not there yet."""
        folder = data_folder() / self.name
        return [name for download in self.downloads for name in download.files if not (folder / name).is_file()]


def _idx(base: str, checksums: dict[str, str]) -> tuple[Download, ...]:
    return tuple(Download(f"{base}{name}-ubyte.gz", f"md5:{checksum}") for name, checksum in checksums.items())


MNIST = {
    "train-images-idx3": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1": "ec29112dd5afa0611ce80d1b7f02629c",
}
FASHION_MNIST = {
    "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
}
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
ARCHIVE = "https://www.timeseriesclassification.com/aeon-toolkit/"
UCI = "https://archive.ics.uci.edu/static/public/"
HOUSE_NUMBERS = "http://ufldl.stanford.edu/housenumbers/"


def _series(name: str, summary: str) -> DataSet:
    folder = FOLDERS[name]
    members = tuple(f"{folder}_{part}.ts" for part in ("TRAIN", "TEST"))
    return DataSet(name, f"{summary}; UEA archive", (Download(f"{ARCHIVE}{folder}.zip", members=members),))


_ALL = (
    DataSet(
        "mnist",
        "70,000 digits 28x28; Y. LeCun, C. Cortes, C. Burges",
        _idx("https://ossci-datasets.s3.amazonaws.com/mnist/", MNIST),
    ),
    DataSet(
        "fashion_mnist",
        "70,000 clothes 28x28; Zalando Research, MIT licence",
        _idx("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", FASHION_MNIST),
    ),
    DataSet(
        "cifar10",
        "60,000 colour images 32x32, 170 MB; A. Krizhevsky",
        (
            Download(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "md5:c32a1d4ab5d03f1284b67883e8d87530",
                CIFAR_FILES,
            ),
        ),
    ),
    DataSet(
        "svhn",
        "99,289 house numbers 32x32, 250 MB; Y. Netzer et al., non-commercial use",
        (
            Download(f"{HOUSE_NUMBERS}train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
            Download(f"{HOUSE_NUMBERS}test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    DataSet(
        "protein",
        "45,730 x 10 properties of proteins; UCI, CC BY 4.0",
        (Download(f"{UCI}265/physicochemical+properties+of+protein+tertiary+structure.zip", members=("CASP.csv",)),),
    ),
    DataSet(
        "miniboone",
        "130,064 x 50 measurements of neutrinos; UCI, CC BY 4.0",
        (Download(f"{UCI}199/miniboone+particle+identification.zip", members=("MiniBooNE_PID.txt",)),),
    ),
    _series("japanese_vowels", "640 utterances of nine speakers"),
    _series("spoken_arabic_digits", "8,798 utterances of ten digits"),
    _series("articulary_words", "575 recordings of lips and tongue"),
    _series("character_trajectories", "2,858 letters written with a pen"),
)
DATA_SETS = {dataset.name: dataset for dataset in _ALL}


def fetch(name: str, report: Report = lambda file, done, total: None) -> Iterator[tuple[Path, str]]:
    """Download what is missing of a data set.

    Args:
        name: of :data:`DATA_SETS`.
        report: told of the progress.

    Yields:
        Each file and what is known of it: "there already", "checksum as published" or "checksum noted, none
        is published".

    Raises:
        ProblemError: no data set has this name.
        DataError: pooch is missing, the network fails, or a file is not what was expected.
    """
    if name not in DATA_SETS:
        known = ", ".join(DATA_SETS)
        raise ProblemError(f"no data set is called {name!r}{nearest(name, DATA_SETS)}; expected one of: {known}")
    folder = data_folder() / name
    for download in DATA_SETS[name].downloads:
        paths = [folder / file for file in download.files]
        if all(path.is_file() for path in paths):
            yield from ((path, "there already") for path in paths)
            continue
        with _tidy(folder, _part(download, folder)):
            got = _retrieve(download, folder, report)
            if download.members:
                _unpack(got, paths)
            notes = ["checksum as published" if download.checksum else _note(path) for path in paths]
        yield from zip(paths, notes, strict=True)


@contextmanager
def _tidy(folder: Path, part: Path) -> Iterator[None]:
    """After a failure there are no folders that were not there before, unless they hold something."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        if part.exists() and not part.stat().st_size:
            part.unlink()
        with suppress(OSError):  # the first that is not empty
            for each in made:
                each.rmdir()
        raise


def _part(download: Download, folder: Path) -> Path:
    """What has come so far of a file."""
    return folder / f".{download.url.rpartition('/')[2]}.part"


def _retrieve(download: Download, folder: Path, report: Report) -> Path:
    try:
        import pooch
        import requests
    except ImportError as error:
        raise DataError("downloads need pooch, expected but not found: pip install 'ocnopt[data]'") from error
    pooch.get_logger().setLevel("WARNING")
    name, part = download.url.rpartition("/")[2], _part(download, folder)
    try:
        place = pooch.retrieve(
            download.url,
            download.checksum or None,
            name,
            folder,
            downloader=_Resuming(part, report),
        )
    except requests.RequestException as error:
        some = part.exists() and part.stat().st_size
        again = "fetch again, which goes on where it stopped" if some else "fetch it where there is a network"
        raise DataError(
            f"{download.url} could not be downloaded ({_reason(error)}); expected the whole file: {again}, or put it "
            f"into {folder} by hand"
        ) from error
    except ValueError as error:  # pooch's word for another checksum; the file is gone
        raise DataError(f"{error} expected {download.checksum}: fetch again, or ask the source what changed") from error
    return Path(place)


def _reason(error: BaseException) -> str:
    """The words of the innermost error, which the libraries around it repeat."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error)


class _Resuming:
    """What pooch calls to download: appends to what an earlier call has left."""

    def __init__(self, part: Path, report: Report) -> None:
        self._part, self._report = part, report

    def __call__(self, url: str, output_file: str | IO[bytes], *rest: Any, **options: Any) -> None:
        import requests

        done = self._part.stat().st_size if self._part.exists() else 0
        asked = {"Range": f"bytes={done}-"} if done else {}
        with requests.get(url, stream=True, timeout=60, headers={"Accept-Encoding": "identity", **asked}) as answer:
            if answer.status_code == 416:  # more is there than the server has: begin anew
                self._part.unlink()
                self(url, output_file)
                return
            answer.raise_for_status()
            done = done if answer.status_code == 206 else 0
            length = answer.headers.get("Content-Length")
            total = done + int(length) if length else 0
            with self._part.open("ab" if done else "wb") as file:
                for piece in answer.iter_content(PART):
                    file.write(piece)
                    self._report(self._part.name[1:-5], file.tell(), total)
        if total and self._part.stat().st_size != total:
            raise requests.ConnectionError(f"{self._part.stat().st_size} of {total} bytes came")
        self._part.replace(str(output_file))


def _unpack(archive: Path, paths: list[Path]) -> None:
    """Those members whose names fit, wherever they lie in the archive; nothing else is written.

    The archive is removed, but for a full disk or an interruption, after which it need not be downloaded again.
    """
    try:
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as packed:
            members = packed.namelist() if isinstance(packed, zipfile.ZipFile) else packed.getnames()
            for path in paths:
                member = next((member for member in members if member.rpartition("/")[2] == path.name), None)
                if member is None:
                    archive.unlink()
                    raise DataError(
                        f"{archive} holds {', '.join(members[:6]) or 'nothing'}; expected {path.name} in it: the "
                        "source has changed, put the files there by hand"
                    )
                content = packed.open(member) if isinstance(packed, zipfile.ZipFile) else packed.extractfile(member)
                write_atomically(path, content.read() if content else b"")
    except BROKEN as error:
        size = archive.stat().st_size
        archive.unlink()
        raise DataError(
            f"{archive} of {size} bytes is no whole archive ({error}); expected one: fetch again"
        ) from error
    archive.unlink()


def _note(path: Path) -> str:
    """Keep the SHA-256 of a file without a published checksum, or compare it with the one that was kept."""
    kept = data_folder() / CHECKSUMS
    name = f"{path.parent.name}/{path.name}"
    sums = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sums.setdefault(name, found) != found:
        path.unlink()
        raise DataError(
            f"{name} has SHA-256 {found}; expected {sums[name]}, noted in {kept} at the first download: if the source "
            "has published a new version, remove that entry and fetch again"
        )
    replace_file(kept, lambda beside: beside.write_text(json.dumps(sums, indent=1), encoding="utf-8"))
    return "checksum noted, none is published"
