"""A pytest plugin: the package's annotations are checked by beartype while the tests run.

Every function and method of a module, and the fields of every dataclass, are wrapped as the module is imported. Three
things are left out on purpose, because together they took a third of the time of all tests:

- a function within a function: it would be compiled anew each time the one around it runs, which is checked itself;
- bytecode caches: other packages that a module imports would look for theirs in the place of the checked one;
- an annotation in quotes that names nothing yet, above all what is imported for type checkers only.
"""

import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from beartype import beartype

PACKAGE = "ocnopt"
NAME = "_checked"


class Finder:
    """Finds the package's modules for Python's import, and lets the loader below read them."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    """Adds the check as the decorator of each function and class."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        _decorate(tree)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, NAME, checked)
        super().exec_module(module)


def _decorate(parent: ast.AST) -> None:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef):  # nearest to the function, before others change what it takes
            node.decorator_list.append(ast.copy_location(ast.Name(NAME, ast.Load()), node))
        elif isinstance(node, ast.ClassDef):  # after @dataclass, which makes the __init__
            node.decorator_list.insert(0, ast.copy_location(ast.Name(NAME, ast.Load()), node))
            _decorate(node)
        elif isinstance(node, ast.stmt):
            _decorate(node)


def checked(thing: Callable) -> Callable:
    """Wrap a function, or the ``__init__`` of a dataclass."""
    if not isinstance(thing, type):
        return beartype(_known(thing))
    if is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = beartype(_known(thing.__init__))
    return thing


def _known(function: Callable) -> Callable:
    for argument, hint in list(function.__annotations__.items()):
        if isinstance(hint, str) and hint not in function.__globals__:
            del function.__annotations__[argument]
    return function


if PACKAGE in sys.modules:
    raise RuntimeError(
        f"{PACKAGE} is imported already; expected this plugin before it: load it with -p in pyproject.toml"
    )
sys.meta_path.insert(0, Finder)
