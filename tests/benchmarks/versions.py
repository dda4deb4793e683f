"""This version of the package against another checkout, case by case: two processes that are asked in turn."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.benchmarks import cases

HERE = Path(__file__).resolve().parents[2]

Ask = Callable[[str], tuple[float, int]]


class Cost(NamedTuple):
    """One case: the median time and its work here, and the median of (time here / time there), if there is a there."""

    case: str
    milliseconds: float
    work: int
    ratio: float | None
    ratio_of_work: float | None


@contextmanager
def version(root: Path) -> Iterator[Ask]:
    """A process that runs cases with the package below a folder.

    Raises:
        FileNotFoundError: there is no package below it.
    """
    if not (root / "ocnopt" / "__init__.py").is_file():
        raise FileNotFoundError(f"{root} holds no package ocnopt; expected the root of a checkout")
    # -P: or the folder of the script would come before the package
    with subprocess.Popen(
        [sys.executable, "-P", cases.__file__],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        found = process.stdout.readline().strip()
        if not Path(found).is_relative_to(root):
            raise RuntimeError(f"the process found the package in {found or 'no place'}, not below {root}")

        def ask(case: str) -> tuple[float, int]:
            process.stdin.write(f"{case}\n")
            process.stdin.flush()
            seconds, work = process.stdout.readline().split()
            return float(seconds), int(work)

        try:
            yield ask
        finally:
            process.kill()


def measure(case: str, here: Ask, there: Ask | None, repeats: int = 5) -> Cost:
    """Ask in turn; the first round warms up."""
    rounds = [(here(case), there(case) if there else None) for _ in range(repeats + 1)][1:]
    seconds, work = median(own[0] for own, _ in rounds), rounds[0][0][1]
    if there is None:
        return Cost(case, 1e3 * seconds, work, None, None)
    return Cost(
        case,
        1e3 * seconds,
        work,
        median(own[0] / other[0] for own, other in rounds),
        work / rounds[0][1][1],
    )
