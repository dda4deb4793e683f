"""What a user hands to the optimisers: read here once, refused, or warned of."""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ocnopt.checks import check_choice, check_count, check_number, check_options, is_number, is_whole, listed, nearest
from ocnopt.differential.kronecker import as_matrix, is_layer
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.bases import MOST_OUTPUTS, is_wide

FACTORS = (0.01, 50.0)  # between which the factors of lr stay
DRAWN = ("sampled", "gauss_newton")  # curvatures that need backward passes of their own
CURVATURES = ("gradient", "costate", "mixed", *DRAWN)
# what a group may hold beside options: what torch and its schedulers write, and what it is called
_SCHEDULED = ("initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_BESIDE_OPTIONS = frozenset(("params", "param_names", "name", "layer", *_SCHEDULED))

_ONE_PROCESS = (
    "train in one process, or with SNOpt or an optimiser of torch.optim: each process would feed back over its own "
    "samples, and the copies of the model would drift apart"
)


class Block(NamedTuple):
    """Live parameters that move as one matrix ``(groups, b, a)``: a weight, with its layer's bias as last column."""

    name: str
    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    groups: int

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight, and bias where it is live."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, b and a."""
        rows = len(self.weight) // self.groups
        return self.groups, rows, self.weight.numel() // len(self.weight) + (self.bias is not None)

    def matrix(self, of: Mapping[Tensor, Tensor]) -> Tensor:
        """What belongs to the parameters, as one matrix."""
        return as_matrix(of[self.weight], None if self.bias is None else of[self.bias], self.groups)

    def parts(self, matrix: Tensor) -> dict[Tensor, Tensor]:
        """The parts of a matrix that belong to each parameter, in its memory."""
        if self.bias is None:
            return {self.weight: matrix.view(self.weight.shape)}
        return {self.weight: matrix[..., :-1].view(self.weight.shape), self.bias: matrix[..., -1].view(self.bias.shape)}


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """The names of a model's parameters."""
    return {parameter: name for name, parameter in model.named_parameters()}


def is_live(parameter: Tensor) -> bool:
    """Whether a parameter is trained at present."""
    return parameter.requires_grad


def find_blocks(model: nn.Module, trained: Collection[Tensor]) -> list[Block]:
    """The matrices among the parameters: trained, of one module alone and not of too many outputs.

    The bias of a layer joins its weight, unless that is wide. Rows of an embedding are no directions of a matrix.
    """
    owners: Counter[Tensor] = Counter(p for module in model.modules() for p in module.parameters(recurse=False))

    def is_own(parameter: Tensor | None) -> TypeGuard[nn.Parameter]:
        return parameter is not None and parameter.requires_grad and parameter in trained and owners[parameter] == 1

    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = key == "weight" and is_layer(module)
            if is_own(parameter) and (is_weight or _is_matrix(parameter)):
                groups = _groups(module, parameter, key)
                joins = is_weight and not is_wide(len(parameter) // groups, parameter[0].numel() + 1)
                bias = module.bias if joins and is_own(module.bias) else None
                found.append(Block(name if is_weight else f"{name}.{key}".lstrip("."), module, parameter, bias, groups))
    return [block for block in found if len(block.weight) // block.groups <= MOST_OUTPUTS]


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and len(parameter) > 1 and parameter.numel() > len(parameter)


def _groups(module: nn.Module, parameter: Tensor, key: str) -> int:
    """How many matrices a parameter holds: groups of a convolution, gates of a cell, projections of an attention."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not key.startswith("weight_hr"):
        return parameter.shape[0] // module.hidden_size
    if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
        return 3
    groups = getattr(module, "groups", 1)
    return groups if key == "weight" and isinstance(groups, int) and groups > 0 and len(parameter) % groups == 0 else 1


def check_not_parallel(model: object) -> None:
    """Refuse a model for several processes."""
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                place = f"holds a DistributedDataParallel at {name!r}" if name else "is a DistributedDataParallel"
                raise ProblemError(f"the model {place}; expected one that a single process trains: {_ONE_PROCESS}")
    check_one_process()


def check_one_process() -> None:
    """Refuse to work beside other processes: a model that is wrapped later shows nowhere else."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ProblemError(
            f"torch.distributed runs {distributed.get_world_size()} processes; expected one: {_ONE_PROCESS}"
        )


def is_distributed() -> bool:
    """Whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sizes(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each; on a CPU that takes a tenth of the time of the largest entry."""
    found = torch._foreach_norm([*gradients]) if gradients else (torch.zeros(()),)
    return gathered(found)


def gathered(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars as one tensor, also those of several devices or precisions."""
    several = len({*map(attrgetter("device", "dtype"), numbers)}) > 1
    return torch.stack([number.to(numbers[0]) for number in numbers] if several else [*numbers])


def not_finite(named: Iterable[tuple[str, Tensor]], norms: Tensor) -> list[str]:
    """The names of tensors that hold NaN or infinity; norms of finite ones may be too large a number."""
    if math.isfinite(norms.amax()):
        return []
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]


def check_dense(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The gradients of named parameters that have any; refuse sparse ones."""
    found = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None and parameter.numel()]
    sparse = [name for name, gradient in found if gradient.layout is not torch.strided]
    if sparse:
        raise ProblemError(
            f"the gradients of {listed(sparse)} are sparse; expected dense ones: build the layer with sparse=False"
        )
    return found


def check_gradients(named: Iterable[tuple[str, Tensor]], step: int | None = None) -> Tensor:
    """Refuse sparse gradients, and NaN or infinity; their sizes."""
    found = check_dense(named)
    norms = sizes([gradient for _, gradient in found])
    if names := not_finite(found, norms):
        raise NonFiniteError(
            f"the gradients of {listed(names)} hold NaN or infinity{'' if step is None else f' at step {step}'}; "
            "expected finite numbers. Parameters and state are as before this step: catch this error to skip it; "
            "if it comes again, lower lr, or raise the damping if there is one"
        )
    return norms


def check_known(parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Refuse parameters that are not the model's."""
    for parameter in parameters:
        if parameter not in names:
            raise ProblemError(
                f"param_groups holds a tensor of shape {tuple(parameter.shape)} that is no parameter of the model; "
                "expected parameters of the model that the optimiser was given: give it the module that holds them"
            )


def read_groups(param_groups: Any) -> list[Any]:
    """Groups as a list with one of them at least, to be read by torch."""
    is_several = isinstance(param_groups, Iterable) and not isinstance(param_groups, Mapping | Tensor)
    return [*param_groups] or [{"params": []}] if is_several else [param_groups]


def not_a_group(group: object, error: Exception) -> ProblemError:
    """What to say where torch cannot read a group of parameters."""
    came = f"a dictionary with {[*group]}" if isinstance(group, dict) else type(group).__name__
    return ProblemError(
        f"a group of param_groups is {came}, which torch refuses ({error}); expected parameters of the model with "
        'options of their own: {"params": model.head.parameters(), "lr": 0.001}'
    )


def add_group(optimizer: torch.optim.Optimizer, group: Any, names: Mapping[Tensor, str]) -> None:
    """Let torch read a group of parameters, and keep it if it is one of the model's, whose names are given."""
    try:
        torch.optim.Optimizer.add_param_group(optimizer, group)
    except (KeyError, TypeError) as error:
        raise not_a_group(group, error) from error
    read = optimizer.param_groups.pop()
    check_option_names(read, optimizer.defaults, type(optimizer).__name__)
    check_options(read)
    check_known(read["params"], names)
    optimizer.param_groups.append(read)


def check_option_names(group: Mapping[str, Any], options: Collection[str], optimizer: str) -> None:
    """Refuse options that nobody would read."""
    for name in group:
        if name not in options and name not in _BESIDE_OPTIONS:
            raise ProblemError(
                f"a group of parameters has the option {name!r}; expected options of a group of {optimizer}, "
                f"{listed([*options])}{nearest(name, options)}: leave it out, or give it to the constructor"
            )


def check_same_shape(name: str, key: str, came: torch.Size, expected: torch.Size) -> None:
    """Refuse a state that was made for a parameter of another shape."""
    if came != expected:
        raise ProblemError(
            f"the {key} of {name} has shape {tuple(came)}; expected {tuple(expected)}: the optimiser was made before "
            "prune(), or something else that changed shapes: make it anew"
        )


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups without any parameter, and complex ones."""
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.is_complex():
            raise ProblemError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; expected real ones: hold "
                "real and imaginary part in two parameters, or in one through torch.view_as_complex"
            )
    if not any(group["params"] for group in groups):
        raise ProblemError(
            "param_groups holds no parameter; expected one at least, as nothing would be trained: leave param_groups "
            "out to train the whole model"
        )


def check_fields(odes: Sequence[NeuralODE]) -> None:
    """Refuse ``everywhere=False`` where nothing would be preconditioned."""
    if not odes:
        raise ProblemError(
            "everywhere=False met a model without a NeuralODE; expected at least one, as only layers inside of "
            "them are preconditioned then: leave everywhere=True"
        )


def check_recipe(options: Mapping[str, Any]) -> None:
    """Refuse options of SNOpt as a whole that are out of range, given or loaded."""
    check_choice("curvature", options["curvature"], CURVATURES)
    check_number("power", options["power"], "a number >= 0, 0.75 by default")
    check_number("adaptation", options["adaptation"], "a number >= 0, 3 by default")
    check_count("refresh_every", options["refresh_every"], default=10)
    check_choice("length", options["length"], ("noise", "division"))
    check_choice("reduction", options["reduction"], ("mean", "sum"))


def check_state(state: Any, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
    """Refuse the state of another optimiser than SNOpt, that of another model, and one that is damaged."""
    if not isinstance(state, Mapping) or not {"state", "param_groups", "step_count"} <= state.keys():
        came = f"holds {sorted(map(str, state))}" if isinstance(state, Mapping) else f"is {type(state).__name__}"
        raise ProblemError(
            f"the state {came}; expected the state of an SNOpt, with its 'step_count': "
            "load the state of another optimiser into that one"
        )
    entries = state["state"].values() if isinstance(state["state"], Mapping) else [None]
    is_grouped = isinstance(state["param_groups"], list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in state["param_groups"]
    )
    if not is_grouped or not all(isinstance(entry, Mapping) for entry in entries):
        raise ProblemError(
            "the state holds no dictionary for each parameter, or no groups with lists of 'params'; expected what "
            "state_dict() returned: the state is damaged"
        )
    for group in state["param_groups"]:
        check_options(group)
    _check_course(state)
    cure = "load it into an optimiser of the model, and with the groups, that it was saved of"
    saved, own = ([len(group["params"]) for group in each] for each in (state["param_groups"], groups))
    if saved != own:
        raise ProblemError(
            f"the state holds groups of {saved} parameters; expected {own} as here, {listed([*names.values()])}: {cure}"
        )
    indices, parameters = ([p for group in each for p in group["params"]] for each in (state["param_groups"], groups))
    momenta = [state["state"].get(index, {}).get("momentum") for index in indices]
    differ = [
        f"{names.get(p)} {tuple(momentum.shape)} instead of {tuple(p.shape)}"
        for momentum, p in zip(momenta, parameters, strict=True)
        if momentum is not None and momentum.shape != p.shape
    ]
    if differ:
        raise ProblemError(
            f"the state is of another model: {', '.join(differ[:8])}; expected the shapes of this one: {cure}"
        )


def _check_course(state: Mapping[str, Any]) -> None:
    """Refuse numbers in a state of SNOpt that none of its runs writes."""
    lists = {
        key: [*one] if isinstance(one := state.get(key, ()), list | tuple) else [one] for key in ("spent", "norms")
    }
    factors = [one["factor"] for one in (state, *state["state"].values()) if "factor" in one]
    for key, values, (least, most), is_right in (
        ("step_count", [state["step_count"]], (0, math.inf), is_whole),
        ("spent", lists["spent"], (0, math.inf), is_whole),
        ("norms", lists["norms"], (0, math.inf), is_number),
        ("factor", factors, FACTORS, is_number),
    ):
        wrong = [value for value in values if not (is_right(value) and least <= value <= most and value < math.inf)]
        if wrong:
            kind = "whole numbers" if is_right is is_whole else "finite numbers"
            bounds = f"from {least:g} on" if most == math.inf else f"from {least:g} to {most:g}"
            raise ProblemError(f"{key} in the state holds {wrong[0]!r}; expected {kind} {bounds}: the state is damaged")

    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise ProblemError(
                    f"{key} of parameter {index} in the state holds NaN or infinity; expected finite numbers: the "
                    "state is damaged"
                )


def warn_first_order(places: Iterable[nn.Module], blocks: Iterable[Block], trained: Mapping[Tensor, str]) -> None:
    """Name the matrices of some modules that are trained but not preconditioned."""
    meant = {p for place in places for module in place.modules() for p in module.parameters(recurse=False)}
    inside = {parameter for block in blocks for parameter in block.parameters}
    names = [name for p, name in trained.items() if p in meant - inside and is_live(p) and _is_matrix(p)]
    if names:
        warnings.warn(
            "SNOpt preconditions matrices that belong to one module; these are embeddings, shared by several modules "
            f"or of more than {MOST_OUTPUTS} outputs, and get the first-order update: {listed(names)}",
            stacklevel=3,
        )


def warn_explosion(step: int, objection: str) -> None:
    """Tell that a step was taken back."""
    warnings.warn(
        f"the step before step {step} raised {objection} and was taken back, as each will be that does so; the "
        "factors of lr are a quarter now. Expected a step that shortens the way to go: lower lr, or raise weight_decay "
        "if evaluations explode",
        stacklevel=5,
    )


def warn_unseen(name: str) -> None:
    """Name a layer that has gradients but was never seen at work."""
    warnings.warn(
        f"the layer {name!r} received a gradient without a forward pass that SNOpt could see: its "
        "weights are used without calling it, or its inputs are not those of its type; expected the layer "
        "itself to be called; it gets the first-order update",
        stacklevel=7,
    )


def strangers(model: nn.Module, trained: Collection[int], *, whole: bool) -> list[str]:
    """The model's parameters that have a gradient and that nobody trains, given the ids of those that are trained.

    Of a model of which a part is trained (not ``whole``), only where parameters that are trained have left it.
    """
    named = [*model.named_parameters()]
    found = [name for name, p in named if id(p) not in trained and p.grad is not None]
    return found if found and (whole or not {id(p) for _, p in named}.issuperset(trained)) else []


def warn_new_strangers(model: nn.Module, trained: Mapping[Tensor, str], known: set[str], *, whole: bool) -> None:
    """Warn of strangers that are not known yet, and know them."""
    found = strangers(model, {*map(id, trained)}, whole=whole)
    if not known.issuperset(found):
        known.update(found)
        warn_strangers(found)


def warn_strangers(names: Sequence[str]) -> None:
    """Name parameters that came into the model after its optimiser."""
    warnings.warn(
        f"the parameters {listed(names)} of the model have gradients and are not trained: they came, or took the place "
        "of others, after the optimiser was made (load_state_dict(assign=True), model.append); expected those of the "
        "start: make a new optimiser, or call add_param_group",
        stacklevel=7,
    )
