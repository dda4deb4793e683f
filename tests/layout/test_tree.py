"""Lists that must agree with the tree, and names that must not clash."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.layout.tree import FOLDERS, ROOT, package_files, pyproject

# The names that other projects are imported by; a file of the same name, run as a script, would hide them.
FOREIGN = {
    "beartype",
    "casadi",
    "hypothesis",
    "joblib",
    "matplotlib",
    "mlxtend",
    "networkx",
    "numpy",
    "platformdirs",
    "pooch",
    "pytest",
    "rich",
    "scipy",
    "sklearn",
    "torch",
    "torchdiffeq",
    "typer",
}


def test_the_package_list_is_the_tree():
    packages = {str(Path(name).parent).replace("/", ".") for name in package_files() if name.endswith(".py")}
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_every_package_has_an_init():
    files = package_files()
    for package in pyproject()["tool"]["setuptools"]["packages"]:
        assert f"{package.replace('.', '/')}/__init__.py" in files


def test_the_mapping_names_the_real_folders():
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {package: folder for folder, package in FOLDERS.items()}


@pytest.mark.parametrize("name", ["problems", "solvers"])
def test_the_links_are_relative_and_lead_to_the_real_folder(name):
    link = ROOT / "ocnopt" / name
    assert link.is_symlink(), f"{link} must be a link; where git checks out none, only the installed package works"
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_no_file_hides_a_library():
    # `ocnopt` hides nothing: inside a package every import is absolute. Anything can be run as a script, though.
    for folder in (*FOLDERS, "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.stem not in FOREIGN, f"{path} would be imported instead of the library when run as a script"


@pytest.mark.parametrize("folder", ["problems", "solvers"])
def test_nothing_below_the_linked_folders_imports_the_whole_package(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [node.module]
            assert "ocnopt" not in names, f"{path}:{node.lineno}: import from the submodule, not from ocnopt"


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        # No local tag ("+cpu") and no address: the same file serves every build of torch.
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin), pin
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


def test_constraints_pin_every_dependency_inside_its_range():
    pins, project = constraints(), pyproject()["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["data"], *extras["dev"]]:
        requirement = Requirement(line)
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is missing from constraints.txt"
        assert pinned in requirement.specifier, f"constraints.txt has {requirement.name} {pinned}, outside {line}"
