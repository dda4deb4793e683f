"""A plain torch function as a graph of core ATen operators.

Non-strict tracing simply runs the function, on tensors that show their shapes but no values. What it cannot follow, a
branch on a value or a detour through numpy or Python numbers, becomes a ProblemError that names it.

There are two ways to the same graph. One writes down the operators as they meet such tensors: quick, and it sees
through torch.func. ``torch.export`` with ``strict=False`` takes far longer, seconds for its import alone, and turns
writes in place into plain operators: it is used where the first fails, and its errors are the ones reported.
"""

import contextlib
import functools
import logging
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowering.expression import SHAPE_ONLY, is_mutable, operator_name

Function = Callable[..., Any]

ELSEWHERE = "solver='ddp' takes any torch code"
LOCK = threading.RLock()
"""Held while tracing: torch keeps one tracer in the process, and another thread's operators would enter its graph."""
_NUMPY = "it leaves torch for numpy, which a trace cannot follow; write it in torch"
_HINTS = (
    ("data is not allocated", "it builds a tensor from entries with torch.tensor([x[0], ..]); use torch.stack"),
    ("zuf", "it turns a tensor into a Python number (float(x), x.item(), math.sin(x)); use torch.sin(x)"),
    ("Eq(u", "it branches or loops on the value of a tensor (if, while); use torch.where"),
    ("data-dependent", "it does something that depends on the value of a tensor; use torch.where"),
    ("numpy()", _NUMPY),
    ("_higher_order_ops", "it uses cond, while_loop or the like; write it with other operators, such as torch.where"),
    ("is mutated", "it writes into a tensor made outside; create the tensor inside the function, or clone it first"),
)  # fmt: skip


_RESHAPING = ("aten.squeeze_.dim", "aten.squeeze_.default", "aten.unsqueeze_.default", "aten.t_.default")


_NEED_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class _NotQuickError(Exception):
    """The quick trace met a write in place, or an operator whose result is not one of shapes alone."""


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function: nodes in order, captured numbers and arguments by node name, the output in terms of nodes."""

    name: str
    nodes: list[torch.fx.Node]
    captured: Mapping[str, Tensor]
    arguments: list[str]
    output: Any
    dtype: torch.dtype
    elsewhere: str = ELSEWHERE


class _Call(torch.nn.Module):
    """torch.export wants a module. The function is no submodule of it: captured weights stay plain constants."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.__dict__["function"] = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.__dict__["function"](*arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own notes about a failing trace from the user, who gets a ProblemError instead."""
    from torch.export import _trace as export_trace

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    # torch.export prints the graph it could not finish; stderr itself belongs to the whole process
    module: Any = export_trace
    module.print = lambda *_, **__: None
    try:
        yield
    finally:
        del module.print
        logger.setLevel(level)


def trace(function: Function, arguments: Sequence[Tensor], name: str, elsewhere: str = ELSEWHERE) -> Program:
    """Trace ``function`` at tensors of the shapes that it will see.

    Args:
        function: plain torch code of several tensors.
        arguments: example tensors; only shapes and dtypes matter.
        name: what the user calls the function, for messages.
        elsewhere: what takes any torch code, likewise.

    Raises:
        ProblemError: the function cannot be traced; the message says what it does and what to write instead.
    """
    dtype = next((a.dtype for a in arguments if a.is_floating_point()), torch.float64)
    with LOCK, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return replace(_quick(function, arguments, name, dtype), elsewhere=elsewhere)
        except Exception:
            pass
        try:
            with _quiet():
                return replace(_export(function, arguments, name, dtype), elsewhere=elsewhere)
        except ProblemError:
            raise
        except Exception as error:
            raise ProblemError(_message(name, error, elsewhere)) from error


def _message(name: str, error: Exception, elsewhere: str) -> str:
    text = str(error).strip()
    for sign, hint in _HINTS:
        if sign in text:
            return f"{name} cannot be translated to CasADi: {hint} ({elsewhere})"
    return (
        f"{name} cannot be translated to CasADi: torch.export failed with {type(error).__name__}: "
        f"{text.splitlines()[0] if text else ''}; expected plain torch code of tensors ({elsewhere})"
    )


@functools.cache
def _core_aten() -> dict[Any, Any]:
    known = dict(torch.export.default_decompositions().items())
    # torch's own form of it imports torch's compiler
    known[torch.ops.aten.dot.default] = lambda a, b: (a * b).sum()
    return known


def _quick(function: Function, arguments: Sequence[Tensor], name: str, dtype: torch.dtype) -> Program:
    recorder = _Recorder()
    inputs = [recorder.placeholder(argument) for argument in arguments]
    # nothing can be compiled, and would have to be run as it was written, before this is imported
    compiling = "torch._dynamo" in sys.modules
    with recorder:
        result = (torch.compiler.disable(function) if compiling else function)(*inputs)
    output = recorder.named(result)
    nodes = list(recorder.graph.nodes)
    _check_functional(nodes)
    captured = {key: tensor.detach().cpu() for key, tensor in recorder.captured.items()}
    placeholders = [node.name for node in nodes if node.op == "placeholder"]
    return Program(name, nodes, captured, placeholders, output, dtype)


class _Shown(Tensor):
    """A tensor that shows its shape alone: nobody but the recorder reads the ``value`` that torch computes with."""

    value: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, value: Tensor) -> "_Shown":
        make: Any = Tensor._make_wrapper_subclass
        made: _Shown = make(cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device)
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Only a recorder knows what to do with it."""
        raise _NotQuickError(str(func))


class _Recorder(TorchDispatchMode):
    """Writes every operator down as a node, and has torch compute it at the example."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether to wrap the class for torch.compile, which would import all of it."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.graph = torch.fx.Graph()
        self.captured: dict[str, Tensor] = {}
        self._nodes: dict[int, torch.fx.Node] = {}
        self._kept: list[Tensor] = []  # what is gone would leave its id to another
        self._copies: dict[int, Tensor] = {}
        self._shown: dict[int, _Shown] = {}

    def placeholder(self, tensor: Tensor) -> Tensor:
        """Make a tensor of this shape an argument."""
        argument: Tensor = self._outside(tensor.detach().clone())
        self._note(argument, self.graph.placeholder("argument"))
        return argument

    def named(self, value: Any) -> Any:
        """The value with nodes in the place of tensors."""
        if isinstance(value, Tensor):
            if id(value) not in self._nodes:
                node = self.graph.create_node("get_attr", "captured")
                self._note(value, node)
                self.captured[node.name] = value
            return self._nodes[id(value)]
        if isinstance(value, list | tuple):
            return [self.named(part) for part in value]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take an operator apart into core ones, or write it down."""
        options = kwargs or {}
        if apart := _core_aten().get(func):
            with self:
                return apart(*args, **options)
        with self:
            if (out := func.decompose(*args, **options)) is not NotImplemented:
                return out
        if func is torch.ops.aten.lift_fresh.default:  # what it is given is new in each call
            func = torch.ops.aten.lift_fresh_copy.default
        if _needs_values(func, args):
            raise _NotQuickError(str(func))
        keywords = {key: self.named(value) for key, value in options.items()}
        node = self.graph.call_function(self._plain(func, args), tuple(self.named(args)), keywords)
        inside = {key: self._inside(value) for key, value in options.items()}
        out = self._outside(func(*self._inside(args), **inside))
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the shape itself changes
                func(*args, **options)
        self._note(out, node)
        return out

    def _inside(self, value: Any) -> Any:
        """The value with what torch computes with in the place of tensors; a copy of what is captured."""
        if isinstance(value, _Shown):
            return value.value
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = value.detach().clone()
                self._kept.append(value)
            return self._copies[id(value)]
        if isinstance(value, list | tuple):
            return type(value)(self._inside(part) for part in value)
        return value

    def _outside(self, value: Any) -> Any:
        """The value with what shows shapes in the place of tensors, one for each."""
        if isinstance(value, Tensor):
            # zeros without memory are for derivatives, which keep them apart from all others
            value = torch.zeros_like(value) if value._is_zerotensor() else value
            if id(value) not in self._shown:
                self._shown[id(value)] = _Shown(value)
            return self._shown[id(value)]
        if isinstance(value, list | tuple):
            return type(value)(self._outside(part) for part in value)
        return value

    def _plain(self, func: Any, args: Any) -> Any:
        """A reshaping in place of an intermediate tensor, as in vector @ matrix, is one that makes another tensor."""
        kind = str(func)
        if kind not in _RESHAPING or (before := self.named(args[0])).op != "call_function":
            return func
        before.meta["val"] = self._inside(args[0]).detach()  # its shape until now
        _, name, overload = kind.split(".")
        return getattr(getattr(torch.ops.aten, name[:-1]), overload)

    def _note(self, value: Any, node: torch.fx.Node) -> None:
        node.meta["val"] = value
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
            self._kept.append(value)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                self._note(part, self.graph.call_function(operator.getitem, (node, i)))


def _needs_values(func: Any, args: Any) -> bool:
    """Whether the shape of the result, or the result itself, follows from more than the shapes of the arguments."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _NEED_VALUES.isdisjoint(func.tags)


def _check_functional(nodes: Sequence[torch.fx.Node]) -> None:
    """Writes in place are harmless only on tensors made from numbers inside the trace, as torch.func.jacrev does."""
    outside: set[torch.fx.Node] = set()
    for node in nodes:
        reads = operator_name(node.target) not in SHAPE_ONLY and outside.intersection(node.all_input_nodes)
        if node.op in ("placeholder", "get_attr") or reads:
            outside.add(node)
        if node in outside and is_mutable(node.target):
            raise _NotQuickError(str(node.target))


def _export(function: Function, arguments: Sequence[Tensor], name: str, dtype: torch.dtype) -> Program:
    from torch.export.graph_signature import InputKind, OutputKind

    exported = torch.export.export(_Call(function), tuple(arguments), strict=False).run_decompositions()
    signature = exported.graph_signature
    kinds = [spec.kind for spec in signature.output_specs]
    if OutputKind.USER_INPUT_MUTATION in kinds:
        raise ProblemError(
            f"{name} writes into its arguments; expected a function without side effects: clone them first"
        )
    inputs = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {**exported.constants, **exported.state_dict}
    captured = {
        spec.arg.name: values[spec.target].detach().cpu() for spec in signature.input_specs if spec.target in values
    }
    nodes = list(exported.graph.nodes)
    flat = [value for value, kind in zip(nodes[-1].args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    output = torch.utils._pytree.tree_unflatten(flat, exported.call_spec.out_spec)
    return Program(name, nodes[:-1], captured, inputs, output, dtype)
