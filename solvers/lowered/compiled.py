"""Folds compiled by the machine's C compiler, where it has one.

All folds of a problem are one C file (see ``source``) and one call of the compiler: ``$CC``, or the first of cc, gcc
and clang on the path. The library stays in the user's cache folder under a name made of everything that it depends on
and of its own content: what is broken, or made for another machine, is not found but built again, and two processes
that build the same at once do not disturb each other. Whatever goes wrong, there is no compiled kernel, and no error.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import platformdirs

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowered import source
from ocnopt.solvers.lowered.arrays import Array
from ocnopt.solvers.lowered.source import Line, write_source
from ocnopt.solvers.lowered.steps import Fold

# Without optimisation beyond this, several thousand lines compile in a fraction of a second.
# Every rounding is CasADi's.
_FLAGS = ("-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w")
# Tried in turn: not every compiler knows the machine it runs on.
_MACHINES = (("-march=native",), ())
# A compiler that takes longer hangs.
_PATIENCE = 120
# So many libraries stay in the cache folder.
_KEPT = 256


class Library:
    """The compiled functions of some folds."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))

    def __getitem__(self, name: str) -> Callable[..., None]:
        """``function(length, lanes, address of the table of arrays, ...)``."""
        function: Any = getattr(self._functions, name)
        whole, address = ctypes.c_longlong, ctypes.c_void_p
        function.argtypes = (whole, whole, address, whole, address) if name == "search" else (whole, whole, address)
        function.restype = None
        return function


def find(folds: Sequence[Fold], search: Line) -> Library | None:
    """The library of these folds, if it was ever compiled here."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return _load(_folder(), _key((*folds, search.walk, search.end), compiler))
    except OSError:
        return None


def build(folds: Sequence[Fold], search: Line) -> Library | None:
    """The library of these folds, compiled unless it was before; None if that is impossible here."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        folder, key = _folder(), _key((*folds, search.walk, search.end), compiler)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _load(folder, key) or _compile(write_source(folds, search), compiler, folder, key)
    except (OSError, subprocess.SubprocessError, ProblemError):
        return None


def find_compiler() -> tuple[str, ...] | None:
    """The command of the C compiler."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(name)
        found = shutil.which(command[0]) if command else None
        if found:
            return (found, *command[1:])
    return None


def _folder() -> Path:
    return platformdirs.user_cache_path("ocnopt") / "kernels"


def _key(folds: Sequence[Fold], compiler: tuple[str, ...]) -> str:
    """A name for everything that a library depends on."""
    made = hashlib.sha256()
    for fold in folds:
        made.update(repr((fold.name, fold.carried, fold.kept)).encode())
        made.update(fold.function.serialize().encode())
    for part in (_writer(), _identity(compiler), repr((_FLAGS, _MACHINES)), _machine()):
        made.update(part.encode())
    return made.hexdigest()[:32]


@cache
def _writer() -> str:
    """What turns folds into C."""
    return Path(source.__file__).read_text()


@cache
def _identity(compiler: tuple[str, ...]) -> str:
    """A compiler and its version; asking it would take longer than the rest of a look into the cache."""
    path = Path(compiler[0]).resolve()
    found = path.stat()
    return repr((str(path), compiler[1:], found.st_size, found.st_mtime_ns))


@cache
def _machine() -> str:
    """The processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.lower().startswith(("model name", "flags", "features", "cpu part"))]
    return repr((platform.machine(), platform.system(), sorted(set(told))))


def _load(folder: Path, key: str) -> Library | None:
    """A library of the cache; what is not as it was written is thrown away."""
    for path in folder.glob(f"{key}-*.so"):
        found = path.stat()
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            continue
        if path.name == _name(key, path):
            with suppress(OSError):
                return Library(path)
        path.unlink(missing_ok=True)
    return None


def _name(key: str, library: Path) -> str:
    return f"{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so"


def _compile(text: str, compiler: tuple[str, ...], folder: Path, key: str) -> Library | None:
    """Compile beside the library's place and move it there once it is whole."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        (here / "folds.c").write_text(text)
        for machine in _MACHINES:
            command = [*compiler, *_FLAGS, *machine, "-o", "folds.so", "folds.c", "-lm"]
            done = subprocess.run(command, cwd=here, capture_output=True, timeout=_PATIENCE, check=False)
            if done.returncode == 0 and (here / "folds.so").exists():
                path = folder / _name(key, here / "folds.so")
                (here / "folds.so").replace(path)
                _forget_old(folder)
                return Library(path)
    return None


def _forget_old(folder: Path) -> None:
    """Keep the cache from growing without end."""
    # another process may tidy up at the same time
    with suppress(OSError):
        libraries = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)
        for path in libraries[: max(0, len(libraries) - _KEPT)]:
            path.unlink()


class Compiled:
    """A fold over the horizon in C: a :class:`~ocnopt.solvers.lowered.kernel.Runner`."""

    def __init__(self, fold: Fold, length: int, library: Library, *, backwards: bool = False) -> None:
        function = fold.function
        self.length, self.backwards, self.run = length, backwards, library[fold.name]
        sizes = [int(function.nnz_out(i)) for i in range(function.n_out())]
        self.last = sizes[: fold.carried]
        self.kept = [(i, length + (i < fold.carried), sizes[i]) for i in fold.kept]

    def __call__(
        self, carried: Sequence[Array], given: Sequence[Array], into: Mapping[int, Array] | None = None
    ) -> tuple[list[Array], list[Array]]:
        """Run all problems."""
        lanes = max(x.shape[-2] for x in (*carried, *given))
        last = [np.empty((lanes, size)) for size in self.last]
        kept = [into[i] if into and i in into else np.empty((time, lanes, size)) for i, time, size in self.kept]
        copies, table = _table([*carried, *given, *last, *kept], self.backwards)
        self.run(self.length, lanes, table)
        del copies
        return last, kept


def _table(arrays: Sequence[Array], backwards: bool = False) -> tuple[list[Array], bytes]:
    """Of each array, where the first step stands, how far the next step and the next problem are, and their number.

    Numbers of one step and problem must stand side by side: where they do not, in a copy, which is to outlive the call.
    """
    numbers: list[int] = []
    copies = []
    for x in arrays:
        if x.strides[-1] != 8 and x.shape[-1] > 1:
            x = np.ascontiguousarray(x)
            copies.append(x)
        address, strides = _address(x), x.strides
        time = strides[0] if len(strides) == 3 else 0
        if backwards and time:
            address, time = address + time * (len(x) - 1), -time
        numbers += (address, time // 8, strides[-2] // 8, x.shape[-2] or 1)
    return copies, struct.pack(f"{len(numbers)}q", *numbers)


def _address(x: Array) -> int:
    """Where the first number stands; what numpy offers takes several times as long as asking for a plain buffer."""
    flags, buffer = x.flags, cast(Any, x)
    if flags.c_contiguous and flags.writeable and x.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    address: int = x.__array_interface__["data"][0]
    return address
