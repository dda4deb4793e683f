"""A run folder: what a run was asked, what it measured, and a checkpoint to go on from.

    config.json     written first, never changed
    metrics.jsonl   one line an iteration, appended
    checkpoint.pt   replaced as a whole
    plots/*.png, report.html
    .lock           held by the one process that may write

A kill at any moment leaves a folder that can be resumed: every file but the metrics is written beside its place,
flushed to the disk and moved there in one step; the metrics are cut back to the checkpoint when a run resumes; the
system releases the lock of a process that ends, however it ends.
"""

import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from ocnopt.errors import DataError, ProblemError

CONFIG, METRICS, CHECKPOINT, REPORT, PLOTS = "config.json", "metrics.jsonl", "checkpoint.pt", "report.html", "plots"
_LOCK = ".lock"
Entry = TypeVar("Entry")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file in one step: a reader, or a run after a kill, finds the old content or the new one, whole.

    Args:
        path: where the content goes.
        write: writes it all to the path that it is given.
    """
    beside = path.with_name(f".{path.name}.part")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """:func:`replace_file` with bytes.

    Args:
        path: where the content goes.
        content: all of it.
    """
    replace_file(path, lambda beside: beside.write_bytes(content))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(file: IO[str]) -> None:
    """Take an exclusive lock or raise at once; the system gives it back when the file is closed."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)  # beyond the text, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def default_folder(command: str, name: str) -> Path:
    """``runs/<command>-<name>-<time>`` in the working folder; a number is added where it exists.

    Args:
        command: of the command line.
        name: of the problem.
    """
    stem = Path("runs") / f"{command}-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 1000)))
    return next(folder for folder in candidates if not folder.exists())


@dataclass(frozen=True)
class RunFolder:
    """One run on the disk; make one with :meth:`create` or :meth:`open`."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """Start a folder.

        Args:
            path: a folder that holds no run yet.
            config: what the run was asked, plain JSON values.

        Raises:
            ProblemError: the folder holds a run already, is a file, or cannot be written.
        """
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        full = {**config, "threads": torch.get_num_threads(), "versions": versions}
        try:
            if (path / CONFIG).exists():
                raise ProblemError(
                    f"{path} holds a run already; expected a new folder: continue that run with --resume {path}"
                )
            if path.exists() and not path.is_dir():
                raise ProblemError(f"{path} is a file; expected a folder that may be created: choose another --out")
            (path / PLOTS).mkdir(parents=True, exist_ok=True)
            write_atomically(path / CONFIG, json.dumps(full, indent=2).encode())
        except OSError as error:
            raise ProblemError(
                f"{path} cannot be written ({error.strerror}); expected a folder that may be created: choose another "
                "--out"
            ) from error
        return cls(path, full)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read a folder back.

        Args:
            path: a folder made by :meth:`create`.

        Raises:
            DataError: no such folder, or its configuration is missing or unreadable.
        """
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{path} holds no {CONFIG} that can be read; expected the folder of a run: give the one that the run "
                "printed as it began"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path / CONFIG} is no JSON ({error}); expected what the run wrote: start a new run"
            ) from error
        if not isinstance(config, dict):
            raise DataError(f"{path / CONFIG} holds {type(config).__name__}; expected an object: start a new run")
        return cls(path, config)

    def entry(self, key: str, read: Callable[[Any], Entry]) -> Entry:
        """One entry of the configuration.

        Args:
            key: its name.
            read: makes something of it; its TypeError means that this version did not write the entry.

        Raises:
            DataError: it is missing, or written by another version.
        """
        try:
            return read(self.config[key])
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path / CONFIG} holds {key} = {self.config.get(key)!r}, which this version does not understand "
                f"({error}); expected what it writes itself: start a new run, or continue with the version of ocnopt "
                "that began this one"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing into this folder meanwhile.

        Raises:
            ProblemError: another process does so.
        """
        with (self.path / _LOCK).open("a+", encoding="utf-8") as file:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                owner = file.read()
                raise ProblemError(
                    f"another process{f' ({owner})' if owner else ''} writes into {self.path}; expected one at a time: "
                    "wait for its end, or start a new run in another folder"
                ) from error
            file.truncate(0)
            file.write(f"pid {os.getpid()}")
            file.flush()
            self.plots.mkdir(exist_ok=True)
            yield

    def discard(self) -> None:
        """Take back a new folder in which nothing was computed, so that its name can be used again."""
        for name in (CONFIG, METRICS, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.plots, self.path):
            with suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    @property
    def holds_results(self) -> bool:
        """Whether a checkpoint was written, here or by a run inside."""
        return any(next(self.path.glob(pattern), None) for pattern in (CHECKPOINT, f"*/{CHECKPOINT}"))

    @property
    def plots(self) -> Path:
        """Where the plots go."""
        return self.path / PLOTS

    def draw(self, name: str, figure: Any) -> str:
        """Write a figure among the plots.

        Args:
            name: of the file, without its ending.
            figure: of matplotlib.

        Returns:
            Its path relative to the folder.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        write_atomically(self.plots / f"{name}.png", buffer.getvalue())
        return f"{PLOTS}/{name}.png"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics.

        Args:
            record: plain JSON values.
        """
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics; a last line that a kill cut short is left out.

        Raises:
            DataError: a line before the last is no JSON.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} is no JSON; expected one object a line: start a new run"
                ) from error
        return records

    def keep_metrics(self, last: int, key: str = "iteration") -> list[dict[str, Any]]:
        """Cut the metrics back to those that a checkpoint knows of, and return them.

        Args:
            last: lines with a greater number are dropped; -1 drops all.
            key: of that number.
        """
        kept = [record for record in self.metrics() if record.get(key, 0) <= last]
        write_atomically(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, after the metrics that belong to it are on the disk.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.
        """
        metrics = self.path / METRICS
        if metrics.exists():
            with metrics.open("rb") as file:
                os.fsync(file.fileno())
        replace_file(self.path / CHECKPOINT, lambda beside: torch.save(dict(state), beside))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None before the first. Nothing pickled but tensors and plain values is loaded.

        Raises:
            DataError: the file is damaged or holds other objects.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            size = path.stat().st_size
            raise DataError(
                f"{path} ({size} bytes) cannot be read ({type(error).__name__}); expected a checkpoint written by this "
                "library: delete the file to start the run again from its configuration"
            ) from error
