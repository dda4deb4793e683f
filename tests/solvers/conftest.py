"""Compiled kernels of these tests stay out of the user's cache, and what another run left there out of these tests."""

import pytest

from ocnopt.solvers.lowered import compiled


@pytest.fixture(autouse=True)
def kernel_folder(request, tmp_path_factory, monkeypatch):
    """One folder for all: what two tests compile is compiled once; quickly, except where the compiler is the matter."""
    folder = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setattr(compiled, "_folder", lambda: folder)
    if request.path.name != "test_compiled.py":
        monkeypatch.setattr(compiled, "_FLAGS", ("-O0", *compiled._FLAGS[1:]))
    return folder
