"""The matrices among a model's parameters, which SNOpt preconditions."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn

from ocnopt.differential.kronecker import as_matrix, is_layer
from ocnopt.optim.bases import MOST_OUTPUTS, is_wide

HIDDEN = 64  # the shorter side of a matrix, above which its steps are shorter in inverse proportion


class Block(NamedTuple):
    """Live parameters with one factor of lr: a weight ``(groups, b, a)``, with its layer's bias as last column.

    Each of the groups moves as a matrix of its own.
    """

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

    @property
    def width_scale(self) -> float:
        """What lr is multiplied by: what an output changes by grows with the width of both sides.

        After Yang et al., arXiv 2203.03466, table 3, who take the inputs alone, and those of output layers too.
        """
        _, rows, columns = self.shape
        return min(1.0, HIDDEN / min(rows, columns - (self.bias is not None)))

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


@contextmanager
def as_live(groups: Iterable[Mapping[str, Any]], live: Sequence[bool] | None) -> Iterator[None]:
    """Frozen and free parameters as they were once, if that is known."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    were = [] if live is None else [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for (parameter, _), is_free in zip(were, live or (), strict=True):
            parameter.requires_grad_(is_free)
        yield
    finally:
        for parameter, is_free in were:
            parameter.requires_grad_(is_free)


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
            if is_own(parameter) and parameter.numel() and (is_weight or is_matrix(parameter)):
                groups = _groups(module, parameter, key)
                joins = is_weight and not is_wide(len(parameter) // groups, parameter[0].numel() + 1)
                bias = module.bias if joins and is_own(module.bias) else None
                found.append(Block(name if is_weight else f"{name}.{key}".lstrip("."), module, parameter, bias, groups))
    return [block for block in found if len(block.weight) // block.groups <= MOST_OUTPUTS]


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has rows and columns, more than one of both."""
    return parameter.ndim > 1 and len(parameter) > 1 and parameter.numel() > len(parameter)


def _groups(module: nn.Module, parameter: Tensor, key: str) -> int:
    """How many matrices a parameter holds: groups of a convolution, gates of a cell, projections of an attention."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not key.startswith("weight_hr"):
        return parameter.shape[0] // module.hidden_size
    if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
        return 3
    groups = getattr(module, "groups", 1)
    return groups if key == "weight" and isinstance(groups, int) and groups > 0 and len(parameter) % groups == 0 else 1
