"""The built wheel holds the whole package and nothing else; without the links in the checkout it is the same."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.layout.tree import FOLDERS, ROOT, package_files, pyproject

IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def build(folder, links=True):
    """Build from a copy, which leaves no build folder behind; where git makes no links it writes text files instead."""
    copy = folder / "ocnopt"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    if not links:
        for name in ("problems", "solvers"):
            (copy / "ocnopt" / name).unlink()
            (copy / "ocnopt" / name).write_text(f"../{name}")
    run(["-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist")], cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel):
    target = wheel.parent / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run(["-m", "pip", "install", *options, str(wheel)], cwd=target.parent)
    return target


def contents(wheel):
    """The name and the check sum of every file."""
    return {entry.filename: entry.CRC for entry in zipfile.ZipFile(wheel).infolist()}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert held == set(package_files())
    assert "ocnopt/py.typed" in held


def test_without_the_links_the_wheel_is_the_same(wheel, tmp_path):
    assert contents(build(tmp_path, links=False)) == contents(wheel)


def test_only_ocnopt_lands_in_site_packages(installed):
    version = pyproject()["project"]["version"]
    # `pip install --target` puts the console script into bin/ beside the packages.
    landed = {entry.name for entry in installed.iterdir()} - {"bin"}
    assert landed == {"ocnopt", f"ocnopt-{version}.dist-info"}
    assert [script.name for script in (installed / "bin").iterdir()] == ["ocnopt"]


def test_the_installed_package_imports_by_its_names_and_solves_a_problem(installed):
    names = ["ocnopt", "ocnopt.problems", "ocnopt.solvers"]
    code = (
        f"import sys, {', '.join(names)}; print(*(sys.modules[name].__file__ for name in {names})); "
        "import ocnopt as oc; "
        "problem = oc.OCP(lambda t, x, u: u, lambda t, x, u: (x**2 + u**2).sum(-1), "
        "initial_state=[1.0], control_dim=1, horizon=1.0); "
        "print(int(oc.solve(problem, steps=20).iterations))"
    )
    *places, iterations = run(["-c", code], cwd=installed.parent, PYTHONPATH=str(installed)).split()
    assert places == [str(installed.joinpath(*name.split("."), "__init__.py")) for name in names]
    assert iterations == "1"
