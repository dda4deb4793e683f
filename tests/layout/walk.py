"""Follow one call through the package: which files it visits, and which files call each other both ways.

A call from a function of file A to a function of file B is an edge A -> B. Frames of other code in between (torch,
wrappers of decorators) are looked through: the caller is the nearest frame of the package. Not edges:

- resuming a generator, since the code that runs then belongs to whoever wrote the generator, not to a call;
- what an import executes;
- entering or leaving an excluded function: an observer or a user's callable handed down, called back by design.

Only the thread that calls is followed; on the CPU torch runs backward passes in that same thread.
"""

import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("ocnopt", "problems", "solvers")

_RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Walk(NamedTuple):
    """Files in the order of their first call, the edges between them, and what the call returned."""

    files: tuple[str, ...]
    edges: frozenset[tuple[str, str]]
    result: Any

    def both_ways(self) -> tuple[tuple[str, str], ...]:
        """Return the pairs of files that call each other, each pair once, sorted."""
        return tuple(sorted((a, b) for a, b in self.edges if a < b and (b, a) in self.edges))

    def visited(self, aside: Collection[str] = ()) -> tuple[str, ...]:
        """Return the files without those set aside, which are named by their path from the root."""
        return tuple(file for file in self.files if file not in aside)


class _Recorder:
    """The profile function: maps code to files and collects edges."""

    def __init__(self, root: Path, folders: Collection[str], exclude: Collection[str]) -> None:
        self.root, self.folders = root.resolve(), tuple(folders)
        self.excluded = [entry.partition("::")[::2] for entry in exclude]
        self.places: dict[str, str | None] = {}
        self.files: dict[str, None] = {}
        self.edges: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        place = self.place(code.co_filename)
        if place is None or code.co_flags & _RESUMED or self.is_excluded(place, code):
            return
        if not self.is_importing(frame):
            self.files.setdefault(place)
            caller = self.caller(frame)
            if caller is not None and caller != place:
                self.edges.add((caller, place))

    def place(self, filename: str) -> str | None:
        """Return the path from the root of a file of the package, links resolved; None for any other file."""
        if filename not in self.places:
            path = Path(filename).resolve()
            inside = path.is_relative_to(self.root) and path.relative_to(self.root).parts[0] in self.folders
            self.places[filename] = path.relative_to(self.root).as_posix() if inside else None
        return self.places[filename]

    def is_excluded(self, place: str, code: CodeType) -> bool:
        name = code.co_qualname
        return any(
            place == file and (not prefix or name == prefix or name.startswith(prefix + "."))
            for file, prefix in self.excluded
        )

    def is_importing(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if self.place(frame.f_code.co_filename) is not None and frame.f_code.co_name == "<module>":
                return True
            frame = frame.f_back
        return False

    def caller(self, frame: FrameType) -> str | None:
        above = frame.f_back
        while above is not None:
            place = self.place(above.f_code.co_filename)
            if place is not None:
                return None if self.is_excluded(place, above.f_code) else place
            above = above.f_back
        return None


def walk(
    function: Callable[[], Any],
    *,
    root: Path = ROOT,
    folders: Collection[str] = PACKAGE,
    exclude: Collection[str] = (),
) -> Walk:
    """Call a function once and return the walk through the package.

    Args:
        function: takes no argument; wrap the call in a lambda.
        root: the folder that paths are relative to.
        folders: top-level folders of the package below the root.
        exclude: callables handed down, each "path/of/file.py" or "path/of/file.py::Qualified.name" (the name covers
            what is defined inside it).
    """
    recorder = _Recorder(root, folders, exclude)
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return Walk(tuple(recorder.files), frozenset(recorder.edges), result)
