"""The size lint fails on what it is for, and on nothing else."""

import subprocess
import sys

import pytest

from tests.style import sizes

GOOD = '''"""A module."""


class Pair:
    """A pair."""

    @staticmethod
    def make(left: float, *rest: float, **options: float) -> "Pair":
        """Make one."""
        return Pair()

    def total(self) -> float:
        """Add."""
        return 0.0
'''


@pytest.fixture
def run(capsys):
    """Return a function that runs the lint on a root and returns its status and its output."""
    return lambda root: (sizes.main([str(root)]), capsys.readouterr().out)


@pytest.fixture
def tree(tmp_path):
    for folder in ("ocnopt", "problems", "solvers", "tests", "examples"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "good.py").write_text(GOOD)
    (tmp_path / "ocnopt" / "solvers").symlink_to("../solvers")
    return tmp_path


def function(lines, docstring_lines=0):
    docstring = ['    """Say it.', *["    more"] * (docstring_lines - 2), '    """'] if docstring_lines else []
    return "\n".join(["def long() -> None:", *docstring, *["    pass"] * (lines - 1)]) + "\n"


def test_a_good_tree_passes_and_links_are_not_counted_twice(tree, run):
    status, output = run(tree)
    assert status == 0, output
    assert "package files: 3, lines median" in output
    assert "package functions: 6, lines median" in output
    assert output.splitlines()[-1] == "sizes: 0 fault(s) in 5 files"


@pytest.mark.parametrize("folder", ["ocnopt", "problems", "solvers", "tests", "examples"])
def test_long_files_fail_everywhere(tree, run, folder):
    (tree / folder / "long.py").write_text("x = 1\n" * 401)
    status, output = run(tree)
    assert status == 1
    assert f"{folder}/long.py: 401 lines, the limit is 400" in output


@pytest.mark.parametrize("folder", ["ocnopt", "tests"])
def test_long_functions_fail_everywhere(tree, run, folder):
    (tree / folder / "long.py").write_text(function(61))
    status, output = run(tree)
    assert status == 1
    assert f"{folder}/long.py:1: long has 61 lines, the limit is 60" in output


def test_the_docstring_of_a_function_is_not_counted(tree, run):
    (tree / "ocnopt" / "fine.py").write_text(function(60, docstring_lines=30))
    status, output = run(tree)
    assert status == 0, output
    assert "60  ocnopt/fine.py:1  long" in output


def test_a_file_at_the_limit_passes(tree, run):
    (tree / "ocnopt" / "fine.py").write_text("x = 1\n" * 400)
    assert run(tree)[0] == 0


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(x) -> None: ...", "f lacks annotations: x"),
        ("def f(x: int): ...", "f lacks annotations: return"),
        ("def f(*a, k, **o) -> None: ...", "f lacks annotations: k, a, o"),
        ("class C:\n    def m(self, y) -> None: ...", "C.m lacks annotations: y"),
        ("class C:\n    @staticmethod\n    def m(y) -> None: ...", "C.m lacks annotations: y"),
        ("class C:\n    def __init__(self, y: int): ...", "C.__init__ lacks annotations: return"),
        ("def f() -> None:\n    def g(z) -> None: ...", "f.g lacks annotations: z"),
        ("if True:\n    async def f(x) -> None: ...", "f lacks annotations: x"),
    ],
)
def test_missing_annotations_fail_in_the_package_alone(tree, run, source, missing):
    (tree / "tests" / "free.py").write_text(source)
    assert run(tree)[0] == 0
    (tree / "solvers" / "bad.py").write_text(source)
    status, output = run(tree)
    assert status == 1
    assert missing in output


def test_asserts_fail_in_the_package_alone(tree, run):
    (tree / "tests" / "free.py").write_text("assert True\n")
    assert run(tree)[0] == 0
    (tree / "problems" / "bad.py").write_text("def f() -> None:\n    assert True\n")
    status, output = run(tree)
    assert status == 1
    assert "problems/bad.py:2: assert in the package" in output


def test_run_as_a_script_it_measures_this_repository():
    result = subprocess.run([sys.executable, sizes.__file__], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert "package functions: " in result.stdout
    assert "fault(s) in" in result.stdout.splitlines()[-1]
