"""What the optimisers of structured descent share: options, manifolds, states, gradients and closures, checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import check_choice, check_number, is_number, listed
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.checks import check_same_shape
from ocnopt.optim.gradient_checks import check_dense, check_gradients, not_finite, sizes
from ocnopt.optim.group_checks import check_option_names
from ocnopt.optim.manifolds import DRIFT, check_on_manifold, drifts, put_onto


@dataclass(frozen=True)
class Number:
    """An option that is a number in ``[above, below)``."""

    expected: str
    below: float = math.inf
    above: float = 0.0


NOT_NEGATIVE = Number("a number >= 0")
POSITIVE = Number("a number > 0", above=math.ulp(0.0))
FRACTION = Number("a number in [0, 1]", below=math.nextafter(1.0, 2.0))


class Descent(torch.optim.Optimizer):
    """Base of the optimisers: everything that a step depends on lies in the groups and the state.

    ``expected`` says for each option of a group what it may be: a :class:`Number`, a type, or a tuple of words. Where
    "manifold" is one of them, the matrices of a group that are trained are put onto its manifold when the group comes.
    """

    expected: ClassVar[Mapping[str, Number | type | tuple[str, ...]]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters, with options of their own.

        Args:
            param_group: ``{"params": ..., option: value, ...}``, as for every torch optimiser.

        Raises:
            ProblemError: an option is unknown or out of range, or a parameter cannot be trained by this optimiser.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        check_option_names(group, self.expected, type(self).__name__)
        self._check_group(group)
        names = names_of(group)
        for parameter, name in zip(group["params"], names, strict=True):
            if not parameter.is_floating_point():
                cure = (
                    "use torch.view_as_real" if parameter.is_complex() else "convert it by .double(), or leave it out"
                )
                raise ProblemError(f"{name} is of {parameter.dtype}; expected real floating-point numbers: {cure}")
        if is_constrained(group):
            put_onto(group["params"], names, group["manifold"])
        self.param_groups.append(group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that ``state_dict`` of the same kind of optimiser returned.

        Args:
            state_dict: with the options and the state of every group.

        Raises:
            ProblemError: the state is another optimiser's.
        """
        for group in state_dict["param_groups"]:
            missing = [name for name in self.expected if name not in group]
            if missing:
                raise ProblemError(
                    f"a group of the state lacks {listed(missing)}; expected the options of {type(self).__name__}: "
                    "load the state of another optimiser into that one"
                )
        super().load_state_dict({**state_dict})

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range: those of a new group, and before each step, as anybody may have set them."""
        for name, expected in self.expected.items():
            _check_option(f"{name} of {type(self).__name__}", group[name], expected)


class Moved(NamedTuple):
    """A group with those of its parameters that have gradients."""

    group: dict[str, Any]
    parameters: list[Tensor]
    gradients: list[Tensor]
    names: list[str]


Tensors = list[Tensor] | tuple[Tensor, ...]


class Change(NamedTuple):
    """What a step makes of the parameters of a group: new values, and new entries of their states."""

    values: Tensors
    state: Mapping[str, Sequence[Any]]


class GradientDescent(Descent):
    """Base of those that take one gradient a step: they say what becomes of the parameters of a group.

    They write nothing: the changes of all groups are made together, or none where one is not finite.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters that have gradients.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite, or the step would make a parameter so, or cannot be taken on
                its manifold; parameters and state are those before the step.
            ProblemError: a gradient is sparse, an option out of range, a matrix was moved off its manifold, or the
                shape of a parameter is not that of its state.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = found_gradients(self)
        for moved in found:
            if is_constrained(moved.group):
                check_on_manifold(moved.parameters, moved.names)
        try:
            changes = [self._change(moved) for moved in found]
        except torch.linalg.LinAlgError as error:
            check_finite(found)
            raise _cannot_step(self, f"has no solution ({error})") from error
        for moved, change in zip(found, changes, strict=True):
            _check_change(self, moved, change)
        for moved, change in zip(found, changes, strict=True):
            torch._foreach_copy_(moved.parameters, change.values)
            for key, entries in change.state.items():
                for parameter, entry in zip(moved.parameters, entries, strict=True):
                    self.state[parameter][key] = entry
        return loss

    def _change(self, moved: Moved) -> Change:
        raise NotImplementedError


def is_constrained(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are matrices that stay on a manifold."""
    return group.get("manifold", "euclidean") != "euclidean"


def found_gradients(optimizer: Descent) -> list[Moved]:
    """The gradients of each group, negated where it maximises.

    Raises:
        ProblemError: one is sparse, or an option is out of range.
    """
    found = []
    for group in optimizer.param_groups:
        optimizer._check_group(group)
        items = zip(group["params"], names_of(group), strict=True)
        live = [(parameter, name) for parameter, name in items if parameter.grad is not None]
        if live:
            parameters = [parameter for parameter, _ in live]
            found.append(Moved(group, parameters, [p.grad for p in parameters], [name for _, name in live]))
    check_dense(item for moved in found for item in zip(moved.names, moved.parameters, strict=True))
    return [
        moved._replace(gradients=[*torch._foreach_neg(moved.gradients)]) if moved.group.get("maximize") else moved
        for moved in found
    ]


def check_finite(found: Sequence[Moved]) -> None:
    """Refuse gradients with NaN or infinity."""
    check_gradients(item for moved in found for item in zip(moved.names, moved.parameters, strict=True))


def needed(closure: Callable[[], Any] | None, example: str) -> Callable[[], Any]:
    """The closure of an optimiser that cannot do without one.

    Raises:
        ProblemError: there is none.
    """
    if closure is None:
        raise ProblemError(f"step came without a closure; expected one that {example}")
    return closure


def loss_of(closure: Callable[[], Any]) -> Any:
    """What a closure without backward returns.

    Raises:
        ProblemError: it calls backward where gradients are off, or returns no number.
    """
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise calls_backward() from error
    if not (is_number(loss) or (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point())):
        came = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ProblemError(f"the closure returned {came}; expected one floating-point number: return the loss")
    return loss


def calls_backward() -> ProblemError:
    """What to say of a closure that should return the loss alone."""
    return ProblemError(
        "the closure calls backward, which is not its part here; expected one that returns the loss alone: take "
        "backward and zero_grad out"
    )


def state_of(
    optimizer: Descent, key: str, moved: Moved, shape: Callable[[Tensor], torch.Size] = Tensor.size
) -> list[Tensor]:
    """An entry of the state of each parameter, zero at first; it follows where the parameter went (``model.to``).

    Raises:
        ProblemError: it has another shape.
    """
    entries = []
    for parameter, name in zip(moved.parameters, moved.names, strict=True):
        entry = optimizer.state.get(parameter, {}).get(key)
        entries.append(parameter.new_zeros(shape(parameter)) if entry is None else entry.to(parameter))
        check_same_shape(name, key, entries[-1].shape, shape(parameter))
    return entries


def names_of(group: Mapping[str, Any]) -> list[str]:
    """What messages call the parameters of a group."""
    given = group.get("param_names")
    return given or [f"parameter {i} of its group" for i in range(len(group["params"]))]


def _check_change(optimizer: Descent, moved: Moved, change: Change) -> None:
    """Refuse a change that is not finite, or that leaves the manifold."""
    # a gradient or a state that is not finite shows in the values, to which it is added
    named = [(name, value) for name, value in zip(moved.names, change.values, strict=True) if value.numel()]
    if names := not_finite(named, sizes([value for _, value in named])):
        check_finite([moved])
        raise _cannot_step(optimizer, f"would put NaN or infinity into {listed(names)}")
    far = max(drifts(change.values), default=0.0) if is_constrained(moved.group) else 0.0
    if not far <= DRIFT:
        raise _cannot_step(optimizer, f"would leave the manifold of {listed(moved.names)} by |U^T U - I| = {far:.3g}")


def _cannot_step(optimizer: Descent, why: str) -> NonFiniteError:
    return NonFiniteError(
        f"the step of {type(optimizer).__name__} {why}; expected one that can be computed. Parameters and state are as "
        "before it: lower lr, or scale the loss or its gradients down"
    )


def _check_option(what: str, value: object, expected: Number | type | tuple[str, ...]) -> None:
    if isinstance(expected, Number):
        check_number(what, value, expected.expected, expected.below, expected.above)
    elif isinstance(expected, tuple):
        check_choice(what, value, expected)
    elif not isinstance(value, expected):
        raise ProblemError(f"{what} is {value!r}; expected a {expected.__name__}: leave it out for the default")
