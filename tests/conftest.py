"""What every test starts from: one thread, a fixed seed, no window, torch's own defaults.

The annotations of the package are checked while the tests run: pyproject.toml loads `tests/annotations.py` before this
file is read.
"""

import gc
import os
import random
import sys
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# No deadline: the first call compiles or imports, and a test of a time would fail on a busy machine.
hypothesis.settings.register_profile("ocnopt", deadline=None, max_examples=20, derandomize=True, database=None)
hypothesis.settings.load_profile("ocnopt")


# What importing and collecting make stays: a million objects that no collection of garbage need ever look through.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before each test and return the seed."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that still read the global state
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Restore torch's global switches after each test, and fail the test that left one changed."""
    before = _switches()
    yield
    after = _switches()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic"])
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    assert not changed, f"global switches of torch left changed (before, after): {changed}"


@pytest.fixture
def float64(no_leaks: None) -> Iterator[torch.dtype]:
    """Make float64 the default of torch for one test that builds networks or tensors without naming a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


def _switches() -> dict:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
