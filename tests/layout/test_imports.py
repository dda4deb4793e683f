"""What an import does in a fresh interpreter: one name for each module, and nothing heavy."""

import subprocess
import sys

import pytest

import ocnopt.solvers  # noqa: F401 - loads what the last test looks at
from tests.annotations import Loader
from tests.layout.tree import ROOT

HEAVY = ("casadi", "matplotlib", "networkx", "pooch", "rich", "sklearn", "torchdiffeq", "typer")
INTERFACE = f"""
import sys, ocnopt as oc
assert "torch" not in sys.modules
import ocnopt.modules
oc.solve
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert {{"OCP", "solve", "from_module", "problems"}} <= set(dir(oc)), dir(oc)
assert all(getattr(oc, name) is not None for name in dir(oc))
assert oc.from_module is ocnopt.modules.from_module
assert oc.neural.neural_ode.NeuralODE is oc.NeuralODE
from ocnopt import *
assert OCP is oc.OCP
try:
    oc.sovle
except AttributeError as error:
    assert (str(error), error.name) == ("module 'ocnopt' has no attribute 'sovle'", "sovle")
try:
    from ocnopt import nothing
except ImportError:
    print("whole")
import ocnopt.problems, ocnopt.solvers
print(heavy, [name for name in sys.modules if name.split('.')[0] in ('problems', 'solvers')])
oc.solvers.CasADi()
print("casadi" in sys.modules)  # the solver needs it when it solves
import torch
from ocnopt.solvers.lowering.lowering import lower
lower(lambda x: x[:2] @ x[1:] * torch.sin(x[0]), [[torch.ones(3)]], "cost").function()
print("torch._dynamo" in sys.modules)
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["problems", "solvers"])
def test_the_bare_name_is_refused(name):
    result = python(f"import {name}")
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert f"ocnopt.{name}" in result.stderr.splitlines()[-1]


def test_submodules_of_the_bare_name_are_refused_too():
    assert "ImportError" in python("import solvers.solve").stderr


def test_the_names_are_read_at_their_first_use_and_bring_nothing_heavy_and_no_second_name():
    """One interpreter for all, a trace included: importing torch is what takes long, its compiler as long again."""
    result = python(INTERFACE)
    assert result.stdout.split("\n") == ["whole", "[] []", "False", "False", ""], result.stderr


def test_help_imports_neither_torch_nor_plots():
    code = "import sys\nfrom ocnopt.cli.main import app\n"
    for arguments in (["--help"], ["solve", "--help"], ["train", "--help"]):
        code += f"app({arguments!r}, standalone_mode=False)\n"
        code += "print([name for name in ('torch', 'numpy', 'matplotlib', 'casadi') if name in sys.modules])\n"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("[")] == ["[]"] * 3


def test_annotations_are_checked_while_the_tests_run():
    """The hook must reach every module, those behind the links too: it replaces their loader."""
    checked = {
        name: isinstance(module.__spec__.loader, Loader)
        for name, module in sys.modules.items()
        # Packages hold names only, and pytest loads them itself where it collects their doctests.
        if name.startswith("ocnopt.") and not hasattr(module, "__path__")
    }
    assert checked["ocnopt.ocp"]
    assert any(name.startswith("ocnopt.solvers.") for name in checked)
    assert all(checked.values()), [name for name, value in checked.items() if not value]
