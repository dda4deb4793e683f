"""The package as it lies in the repository: three folders that install as one package."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Folder in the repository -> name of the installed package.
FOLDERS = {"ocnopt": "ocnopt", "problems": "ocnopt.problems", "solvers": "ocnopt.solvers"}


def pyproject() -> dict[str, Any]:
    """Return the project's settings."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_files() -> dict[str, Path]:
    """Map the installed path of every file of the package, "ocnopt/solvers/solve.py", to where it lies."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT / folder)
            through_link = any((ROOT / folder / parent).is_symlink() for parent in relative.parents if parent.name)
            if path.is_symlink() or path.is_dir() or through_link or "__pycache__" in relative.parts:
                continue
            files[f"{package.replace('.', '/')}/{relative.as_posix()}"] = path
    return files
