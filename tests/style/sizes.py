"""Report the sizes of files and functions and fail on what is too large.

    python tests/style/sizes.py [ROOT]

Limits for every Python file of the repository: 400 lines a file, 60 lines a function (its docstring not counted).
In the package, besides: every argument and every return is annotated, and there is no `assert`, because an assertion
vanishes under `python -O` and says nothing to a user. The figures printed are those of the package alone.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

FILE_LIMIT = 400
FUNCTION_LIMIT = 60
PACKAGE = ("ocnopt", "problems", "solvers")
OTHERS = ("examples", "tests")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """One function, with the lines from its `def` to its end, docstring not counted."""

    place: str
    name: str
    lines: int


class Report(NamedTuple):
    """Sizes found below a root, and one sentence for each rule broken."""

    files: dict[str, int]
    functions: list[Function]
    faults: list[str]


def python_files(root: Path, folders: Sequence[str]) -> list[Path]:
    """Return the files below the folders, each once: links to folders are not followed."""
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parents = path.relative_to(root).parents
            if not any((root / parent).is_symlink() for parent in parents):
                found.append(path)
    return found


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode, bool]]:
    """Yield (qualified name, node, is a method) of every function, nested ones included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FunctionNode):
            yield prefix + node.name, node, isinstance(tree, ast.ClassDef)
            yield from functions_of(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")
        else:
            yield from functions_of(node, prefix)


def length(node: FunctionNode) -> int:
    """Count the lines of a function without its docstring and decorators."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def unannotated(node: FunctionNode, is_method: bool) -> list[str]:
    """Name the arguments, and "return", that carry no annotation."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    is_static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
    if is_method and not is_static:
        arguments = arguments[1:]
    extra = [item for item in (node.args.vararg, node.args.kwarg) if item is not None]
    missing = [item.arg for item in [*arguments, *node.args.kwonlyargs, *extra] if item.annotation is None]
    return missing if node.returns is not None else [*missing, "return"]


def package_faults(place: str, tree: ast.AST) -> list[str]:
    """Return what breaks the rules that hold in the package alone."""
    faults = [
        f"{place}:{node.lineno}: assert in the package; raise an error of ocnopt.errors instead"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    for name, node, is_method in functions_of(tree):
        if missing := unannotated(node, is_method):
            faults.append(f"{place}:{node.lineno}: {name} lacks annotations: {', '.join(missing)}")
    return faults


def inspect(root: Path, folders: Sequence[str], in_package: bool) -> Report:
    """Measure every file below the folders of a root."""
    files: dict[str, int] = {}
    functions: list[Function] = []
    faults: list[str] = []
    for path in python_files(root, folders):
        place, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        tree, files[place] = ast.parse(source, filename=place), len(source.splitlines())
        if files[place] > FILE_LIMIT:
            faults.append(f"{place}: {files[place]} lines, the limit is {FILE_LIMIT}; split the file")
        for name, node, _ in functions_of(tree):
            functions.append(Function(f"{place}:{node.lineno}", name, length(node)))
            if functions[-1].lines > FUNCTION_LIMIT:
                faults.append(
                    f"{place}:{node.lineno}: {name} has {functions[-1].lines} lines, the limit is {FUNCTION_LIMIT}"
                )
        if in_package:
            faults += package_faults(place, tree)
    return Report(files, functions, faults)


def summary(name: str, sizes: Sequence[int]) -> str:
    """Return one line: count, median, ninth decile, maximum."""
    if len(sizes) < 2:
        return f"{name}: {len(sizes)}"
    decile = quantiles(sizes, n=10, method="inclusive")[-1]
    return f"{name}: {len(sizes)}, lines median {median(sizes):g}, p90 {decile:g}, max {max(sizes)}"


def main(arguments: Sequence[str]) -> int:
    """Print the report and return 1 if any rule is broken, else 0."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[2]
    package, others = inspect(root, PACKAGE, in_package=True), inspect(root, OTHERS, in_package=False)
    print(summary("package files", list(package.files.values())))
    print(summary("package functions", [function.lines for function in package.functions]))
    print("ten longest functions:")
    for function in sorted(package.functions, key=lambda item: -item.lines)[:10]:
        print(f"  {function.lines:3d}  {function.place}  {function.name}")
    faults = [*package.faults, *others.faults]
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"sizes: {len(faults)} fault(s) in {len(package.files) + len(others.files)} files")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
