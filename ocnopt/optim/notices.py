"""What an optimiser warns of."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ocnopt.checks import listed
from ocnopt.optim.bases import MOST_OUTPUTS
from ocnopt.optim.blocks import Block, is_live, is_matrix


def warn_first_order(places: Iterable[nn.Module], blocks: Iterable[Block], trained: Mapping[Tensor, str]) -> None:
    """Name the matrices of some modules that are trained but not preconditioned."""
    meant = {p for place in places for module in place.modules() for p in module.parameters(recurse=False)}
    inside = {parameter for block in blocks for parameter in block.parameters}
    names = [name for p, name in trained.items() if p in meant - inside and is_live(p) and is_matrix(p)]
    if names:
        warnings.warn(
            "SNOpt preconditions matrices that belong to one module; these are embeddings, shared by several modules "
            f"or of more than {MOST_OUTPUTS} outputs, and get the first-order update: {listed(names)}",
            stacklevel=3,
        )


def warn_explosion(step: int, objection: str, known: set[str]) -> None:
    """Tell that a step was taken back, for the first one."""
    if "explosion" in known:
        return
    known.add("explosion")
    warnings.warn(
        f"the step before step {step} raised {objection} and was taken back, as each will be that does so; the "
        "factors of lr are a quarter now. Expected a step that shortens the way to go: lower lr, or raise weight_decay "
        "if evaluations explode",
        stacklevel=6,
    )


def warn_unseen(name: str, known: set[str]) -> None:
    """Name a layer that has gradients but was never seen at work, if it is not known yet."""
    if name in known:
        return
    known.add(name)
    warnings.warn(
        f"the layer {name!r} received a gradient without a forward pass that SNOpt could see: its "
        "weights are used without calling it, or its inputs are not those of its type; expected the layer "
        "itself to be called; it gets the first-order update",
        stacklevel=9,
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
        warn_strangers(found, stacklevel=6)


def warn_strangers(names: Sequence[str], stacklevel: int = 7) -> None:
    """Name parameters that came into the model after its optimiser."""
    warnings.warn(
        f"the parameters {listed(names)} of the model have gradients and are not trained: they came, or took the place "
        "of others, after the optimiser was made (load_state_dict(assign=True), model.append); expected those of the "
        "start: make a new optimiser, or call add_param_group",
        stacklevel=stacklevel,
    )
