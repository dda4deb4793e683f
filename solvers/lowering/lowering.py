"""Torch functions as CasADi functions.

A traced function is interpreted on CasADi expressions: operators on numbers alone run in torch, the others by their
rule. Arguments and outputs of a lowered function are columns in row-major order. In a batch ``(*batch, k)`` one problem
is lowered at a time: functions may capture per-sample data, so the whole batch is traced and interpreted once, and the
problem's own inputs and outputs are kept.

Every lowering is compared with torch at the given points: a trace silently freezes what it cannot see.
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import casadi
import torch
from torch import Tensor

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowering import entrywise, joining, movement
from ocnopt.solvers.lowering.buffered import Run, same
from ocnopt.solvers.lowering.expression import (
    Expression,
    Kind,
    NotLowerableError,
    Rule,
    Site,
    as_expression,
    constant,
    gather,
    is_mutable,
    operator_name,
    positions,
    symbol,
)
from ocnopt.solvers.lowering.tracing import ELSEWHERE, LOCK, Function, Program, trace

RULES: dict[str, Rule] = entrywise.RULES | movement.RULES | joining.RULES
WIDE = 16
"""Matrix products with more rows or columns than this are kept whole (MX) instead of being written out (SX)."""

_ROWS = "and index the last axis only (x[..., i], sum(-1))"
Point = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Lowering:
    """A traced function with the points that every CasADi function made from it is compared at."""

    program: Program
    reference: Function
    kind: Kind
    batch_shape: tuple[int, ...]
    points: list[Point]
    values: list[list[Tensor]]
    noise: list[list[Tensor]]
    components: Mapping[str, Function]
    made: dict[int | None, casadi.Function] = field(default_factory=dict)
    """What was made of it, by row."""
    runs: dict[int | None, Run] = field(default_factory=dict)
    """The same, on arrays."""
    captured: dict[str, Tensor] = field(init=False)
    """Copies of what the function captures, whose values are part of what was made of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "captured", {name: value.clone() for name, value in self.program.captured.items()})

    @functools.cached_property
    def whole(self) -> tuple[list[Expression], list[Expression]]:
        """Symbols for the arguments of the whole batch, and the outputs in terms of them."""
        symbols = [symbol(self.kind, f"a{i}", argument.shape) for i, argument in enumerate(self.points[0])]
        return symbols, interpret(self.program, self.kind, symbols)

    def function(self, row: int | None = None) -> casadi.Function:
        """Return the CasADi function, of one problem of the batch where there is a batch.

        Raises:
            ProblemError: an operator has no rule, or CasADi and torch disagree.
        """
        with LOCK, _blame(self.components, self.points, self.batch_shape, row):
            return self._function(row)

    def require_same(self, given: Sequence[Tensor]) -> None:
        """Compare the torch function as it is now with what was made of it.

        Args:
            given: its last arguments as they are now; the others are those of a point.

        Raises:
            ProblemError: they differ: the function is no longer the one that was lowered.
        """
        for key, value in self.program.captured.items():
            if not _unchanged(value, self.captured[key]):
                raise self._changed(f"a tensor {tuple(value.shape)} that its functions capture has changed")
        point = [*self.points[1][: len(self.points[1]) - len(given)], *given]
        # the given ones go in as they are, so that nothing needs to stand in for them
        values = _outputs(self.reference, point, self.program.name)
        for row, lowered in self.made.items():
            run = self.runs[row] if row in self.runs else self.runs.setdefault(row, Run(lowered))
            results = run([self._own(a, row) for a in point])
            for old, value in zip(results, values, strict=True):
                new = self._own(value, row).numpy()
                if not same(new, old):
                    raise self._changed("a tensor or number that its functions capture has changed")

    def _changed(self, what: str) -> ProblemError:
        return ProblemError(
            f"{self.program.name} is no longer what it was when the problem was prepared: {what}; expected changes in "
            "data alone: name that tensor in data=(..) of the problem and write into it in place, or prepare again"
        )

    def _own(self, value: Tensor, row: int | None) -> Tensor:
        """The entries of one problem as a column of float64."""
        column = value.reshape(-1) if row is None else _pick(value, _rows(value.shape, self.batch_shape, row))
        return column.detach().to("cpu", torch.float64)

    def _function(self, row: int | None) -> casadi.Function:
        name = self.program.name
        rows = [_rows(argument.shape, self.batch_shape, row) for argument in self.points[0]]
        inputs, outputs = self.whole
        kept = [_rows(output.shape, self.batch_shape, row) for output in outputs]
        columns = [gather(output.entries, picked) for output, picked in zip(outputs, kept, strict=True)]
        if self.kind is casadi.MX and row is not None:
            symbols, columns = _freeze(inputs, columns, rows, self.points[0])
        else:
            symbols = [gather(whole.entries, picked) for whole, picked in zip(inputs, rows, strict=True)]
        try:
            lowered = casadi.Function(_identifier(name), symbols, columns)
        except RuntimeError as error:
            raise ProblemError(f"{name}: a row of the batch depends on another; {_ROWS}") from error
        for point, values, noise in zip(self.points, self.values, self.noise, strict=True):
            own = [[_pick(v, r) for v, r in zip(side, kept, strict=True)] for side in (values, noise)]
            _compare(name, lowered, [_pick(a, r) for a, r in zip(point, rows, strict=True)], *own)
        self.made[row] = lowered
        return lowered


def lower(
    function: Function,
    points: Sequence[Point],
    name: str,
    batch_shape: tuple[int, ...] = (),
    *,
    reference: Function | None = None,
    components: Mapping[str, Function] | None = None,
    elsewhere: str = ELSEWHERE,
) -> Lowering:
    """Trace a torch function and evaluate it at the points that its CasADi form will be compared at.

    Args:
        function: plain torch code of several tensors, returning a tensor or a tuple of tensors.
        points: arguments; the first ones set the shapes.
        name: what the user calls the function.
        batch_shape: leading axes that hold one problem each.
        reference: what to compare with, if not the function itself.
        components: the user's functions that it is made of, by name: an error is blamed on one of them.
        elsewhere: what takes any torch code, for messages.

    Raises:
        ProblemError: the function cannot be traced.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> lower(lambda x: x[0] * torch.exp(x[1]), [[x]], "cost").function()
        Function(torch_cost:(i0[2])->(o0) SXFunction)
    """
    reference = function if reference is None else reference
    values = [_evaluate(reference, point, name) for point in points]
    components = components or {}
    with LOCK, _blame(components, points, batch_shape, 0 if batch_shape else None):
        program = trace(function, points[0], name, elsewhere)
    noise = [_noise(reference, point, value) for point, value in zip(points, values, strict=True)]
    kind = _kind(program, math.prod(batch_shape))
    return Lowering(program, reference, kind, batch_shape, list(points), values, noise, components)


@contextlib.contextmanager
def _blame(
    components: Mapping[str, Function], points: Sequence[Point], batch_shape: tuple[int, ...], row: int | None
) -> Iterator[None]:
    """Where a function made of several fails, fail with the one that is to blame."""
    try:
        yield
    except ProblemError:
        for name, component in components.items():
            lower(component, points, name, batch_shape).function(row)
        raise


def scattered(arguments: Point, count: int = 3, seed: int = 0) -> list[Point]:
    """Return the arguments and ``count`` seeded points around them, near ones and far ones."""
    generator = torch.Generator().manual_seed(seed)
    points: list[Point] = [list(arguments)]
    for i in range(count):
        spread = (0.01, 0.1, 1.0)[i % 3]
        noise = [torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a) for a in arguments]
        points.append([a + spread * (1 + a.abs()) * z for a, z in zip(arguments, noise, strict=True)])
    return points


def interpret(program: Program, kind: Kind, inputs: Sequence[Expression]) -> list[Expression]:
    """Run a traced function on expressions.

    Raises:
        ProblemError: naming the operator without a rule, and the user's line it comes from.
    """
    known: dict[str, Any] = {**program.captured, **dict(zip(program.arguments, inputs, strict=True))}
    for node in _needed(program):
        if node.op == "call_function":
            try:
                known[node.name] = _apply(node, kind, known, program)
            except NotLowerableError as error:
                name = operator_name(node.target)
                message = f"{program.name} uses {name}, which cannot be translated to CasADi: {error}"
                raise ProblemError(message) from error
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                raise ProblemError(
                    f"{program.name} uses {operator_name(node.target)} in a way that cannot be translated to CasADi "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); expected another "
                    f"form of it: write it with other torch operators ({program.elsewhere})"
                ) from error
    output = program.output if isinstance(program.output, list | tuple) else [program.output]
    return [as_expression(kind, _read(value, known)) for value in output]


def _needed(program: Program) -> list[torch.fx.Node]:
    """Nodes that the output depends on; assertions that torch adds fall away, writes into new tensors stay."""
    needed: set[torch.fx.Node] = set()
    torch.fx.node.map_arg(program.output, needed.add)
    for node in reversed(program.nodes):
        if node in needed or is_mutable(node.target):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in program.nodes if node in needed]


def _read(value: Any, known: dict[str, Any]) -> Any:
    return torch.fx.node.map_arg(value, lambda node: known.get(node.name))


def _apply(node: torch.fx.Node, kind: Kind, known: dict[str, Any], program: Program) -> Any:
    dtype, elsewhere = program.dtype, program.elsewhere
    arguments, options = _read(node.args, known), _read(node.kwargs, known)
    name = operator_name(node.target)
    if "device" in options:
        options = {**options, "device": "cpu"}
    if name == "getitem":
        return arguments[0][arguments[1]] if isinstance(arguments[0], list | tuple) else None
    symbolic: list[Expression] = []
    torch.utils._pytree.tree_map_only(Expression, symbolic.append, (arguments, options))
    target: Any = node.target
    if not symbolic:
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise NotLowerableError("it draws random numbers; draw them outside and capture the tensor")
        return target(*arguments, **options)
    if name not in RULES:
        raise NotLowerableError(
            f"there is no rule for it; write it with other torch operators{_advice(name, elsewhere)}"
        )
    site = _site(node, kind)
    if site.dtype.is_floating_point and torch.finfo(site.dtype).bits < torch.finfo(dtype).bits:
        raise NotLowerableError(
            f"its result is {site.dtype} in a {dtype} problem; stay in {dtype} (an integer tensor times a number is "
            "float32: convert it first)"
        )
    return RULES[name](site, *arguments, **options)


def _advice(name: str, elsewhere: str) -> str:
    if name in ("sort", "topk", "median", "argsort", "kthvalue"):
        return ", such as torch.amax, torch.amin and torch.where"
    if name in ("cond", "while_loop"):
        return ", such as torch.where"
    return f" ({elsewhere})"


def _site(node: torch.fx.Node, kind: Kind) -> Site:
    target: Any = node.target
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) else value
    if not isinstance(value, Tensor):
        return Site(kind, (), torch.float64, target)
    if not all(isinstance(size, int) for size in value.shape):
        raise NotLowerableError(
            "the shape of its result depends on the values; index with integers, or use torch.where"
        )
    return Site(kind, tuple(value.shape), value.dtype, target)


def _kind(program: Program, batch: int) -> Kind:
    """SX for small functions; MX where a matrix product is wide."""
    for node in program.nodes:
        if operator_name(node.target) in ("mm", "addmm", "bmm", "baddbmm"):
            right = node.args[-1]
            if isinstance(right, torch.fx.Node) and max(right.meta["val"].shape[-2:]) > WIDE:
                return casadi.MX
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "call_function" and value.numel() > (WIDE + 1) ** 2 * max(batch, 1):
            return casadi.MX
    return casadi.SX


def _rows(shape: Sequence[int], batch_shape: tuple[int, ...], row: int | None) -> Tensor:
    """Positions of one problem's entries; all of them where the tensor has no batch axes."""
    order = positions(shape)
    if row is None or not batch_shape or tuple(shape[: len(batch_shape)]) != batch_shape:
        return order.reshape(-1)
    rows = math.prod(batch_shape)
    return order.reshape(rows, order.numel() // rows)[row]


def _freeze(
    inputs: Sequence[Expression], columns: Sequence[Any], rows: Sequence[Tensor], point: Point
) -> tuple[list[Any], list[Any]]:
    """Outputs in terms of one row's symbols, the other rows at the point: a matrix product cannot be cut into rows."""
    symbols, arguments = [], []
    for picked, fixed in zip(rows, point, strict=True):
        free = casadi.MX.sym("row", picked.numel())
        source = torch.arange(fixed.numel())
        source[picked] = fixed.numel() + torch.arange(picked.numel())
        arguments.append(gather(casadi.vertcat(constant(casadi.MX, fixed).entries, free), source))
        symbols.append(free)
    function = casadi.Function("whole", [whole.entries for whole in inputs], list(columns))
    return symbols, list(function.call(arguments))


def _pick(value: Tensor, picked: Tensor) -> Tensor:
    return value.reshape(-1)[picked]


def _evaluate(function: Function, point: Point, name: str) -> list[Tensor]:
    """The outputs at a copy of the point."""
    return _outputs(function, [argument.clone() for argument in point], name)


def _unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether a tensor holds what it held, up to rounding."""
    if torch.equal(now, before):
        return True
    return now.shape == before.shape and same(now.double().numpy(), before.double().numpy())


def _outputs(function: Function, point: Point, name: str) -> list[Tensor]:
    with torch.no_grad():
        value = function(*point)
    outputs = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(output, Tensor | int | float) for output in outputs):
        raise ProblemError(f"{name} returned {[type(output).__name__ for output in outputs]}; expected tensors")
    return [torch.as_tensor(output, dtype=torch.float64, device="cpu") for output in outputs]


def _noise(function: Function, point: Point, values: Sequence[Tensor]) -> list[Tensor]:
    """How far rounding of the arguments alone moves the value: functions may be badly conditioned at a random point."""
    nudged = [a * (1 + 4 * torch.finfo(a.dtype).eps) if a.is_floating_point() else a for a in point]
    return [(moved - value).abs() for moved, value in zip(_evaluate(function, nudged, ""), values, strict=True)]


def _compare(
    name: str, lowered: casadi.Function, point: Point, values: Sequence[Tensor], noise: Sequence[Tensor]
) -> None:
    results = lowered.call([casadi.DM(argument.to("cpu", torch.float64).numpy()) for argument in point])
    exact = all(argument.dtype == torch.float64 for argument in point if argument.is_floating_point())
    precision = 1e-12 if exact else 1e-4
    for result, value, rounding in zip(results, values, noise, strict=True):
        got = torch.from_numpy(result.full().reshape(-1))
        scale = 1 + value.abs().nan_to_num(0.0, 0.0, 0.0)
        # A function that changes from call to call must not pass as badly conditioned.
        allowed = precision * scale.sum() + (100 * rounding.nan_to_num(0.0, 0.0, 0.0)).clamp(max=1e-6 * scale)
        wrong = (got - value).abs() > allowed
        wrong &= ~(got.isnan() & value.isnan()) & (got != value)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ProblemError(
                f"{name} gives {got[i].item():.12g} in CasADi and {value[i].item():.12g} in torch at entry {i} of "
                "its output; expected the same: part of it was frozen while tracing (numpy, random, a counter) or "
                f"a row of the batch depends on another; write it in torch alone without side effects, {_ROWS}"
            )


def _identifier(name: str) -> str:
    """A name as CasADi allows it."""
    return "torch_" + re.sub("[^a-zA-Z0-9]+", "_", name).strip("_")
