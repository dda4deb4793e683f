"""What OCNOpt warns of, each thing once."""

import warnings
from collections.abc import Callable, Collection, Sequence

from torch import nn

from ocnopt.checks import listed
from ocnopt.neural.tape import Tape
from ocnopt.optim.game import Game, Rules, Turn
from ocnopt.optim.metrics import Block
from ocnopt.optim.notices import strangers, warn_strangers

# From so many samples on a step takes more than ten times as long as a plain one, where the players' matrices of them
# hold more than ten times the numbers that a plain step multiplies for a sample (measured on one core).
_LARGE, _TIMES = 256, 10


class Notes:
    """Remembers what was said."""

    def __init__(self) -> None:
        self._said: set[tuple[object, str]] = set()

    def strangers(self, model: nn.Module, trained: Collection[int], *, whole: bool) -> None:
        """Parameters that came into the model later."""
        self._say(warn_strangers, strangers(model, trained, whole=whole))

    def unrecorded(self) -> None:
        """Gradients came from elsewhere."""
        self._say(_unrecorded, ["the step"])

    def alone(self, blocks: Sequence[Block], used: Collection[int], game: Game) -> None:
        """Parameters that were used outside of the game."""
        players = {id(p) for player in game.plan.players for p in player.parameters.values()}
        ids = {block.name: id(block.parameters[0]) for block in blocks}
        self._say(_apart, [name for name, own in ids.items() if own in players])
        self._say(_alone, [name for name, own in ids.items() if own in used and own not in players])

    def rescaled(self, turns: Sequence[Turn]) -> None:
        """Layers whose gradients are others than those of their samples."""
        self._say(_rescaled, [turn.block.name for turn in turns])

    def game(self, game: Game, rules: Rules) -> None:
        """A loss that was not recognised, a batch that is too large."""
        rows = sum(tape.rows for tape in game.tapes)
        if rows >= _LARGE and rules.form != "sample":
            numbers = sum(_numbers(game.tapes[0], turn) for turn in game.turns)
            self._say(_large, ["the batch"] if len(game.turns) * rows**2 > _TIMES * numbers else [])
        self._say(_unknown, [game.unknown] if game.unknown else [])

    def _say(self, warn: Callable[[list[str]], None], found: Sequence[str]) -> None:
        found = [name for name in found if (warn, name) not in self._said]
        if found:
            self._said.update((warn, name) for name in found)
            warn(found)


def _numbers(tape: Tape, turn: Turn) -> int:
    """How many products a layer takes for a sample: those of its weight, at every place."""
    weight, *_ = turn.block.parameters
    places = [tape.shapes[slot].numel() for slot in tape.calls[turn.player.call].outputs if slot is not None]
    return sum(places) * weight.numel() // (tape.rows * len(weight))


def _alone(names: Sequence[str]) -> None:
    """Name parameters that take no part in the game."""
    warnings.warn(
        "OCNOpt feeds back through linear layers, convolutions and normalisations that are used once in a forward "
        "pass, on inputs with one row a sample (x[None] for a single one); these parameters are used otherwise and "
        f"take the plain step of the first-order method: {listed(names)}",
        stacklevel=8,
    )


def _apart(names: Sequence[str]) -> None:
    """Name parameters of layers whose first parameter has another metric."""
    warnings.warn(
        "OCNOpt moves a layer as one; these parameters are in groups whose lr (or decay, eps, damping) is not that of "
        f"their layer's first parameter, and take the plain step of the first-order method: {listed(names)}",
        stacklevel=8,
    )


def _rescaled(names: Sequence[str]) -> None:
    """Name layers whose gradients are others than those of their samples."""
    warnings.warn(
        "OCNOpt met gradients that were changed after the backward pass, or by hooks, and are no multiple of what the "
        "model's samples have given; expected one factor >= 0 for a layer (clip_grad_norm_, p.grad /= 2), and further "
        "terms of the loss in the same backward pass; the plain step of the first-order method is taken by: "
        f"{listed(names)}",
        stacklevel=8,
    )


def _unknown(losses: Sequence[str]) -> None:
    """Say that the loss's curvature is not known."""
    warnings.warn(
        f"OCNOpt does not know the curvature of {losses[0]}: by its gradients neither the mean or sum of a cross "
        "entropy without weights, nor of a binary one from logits, over the axes of the outputs; it takes p p^T, which "
        'damps hard samples most: say terminal="squares" (nn.MSELoss) or give a function, or terminal="gradient"',
        stacklevel=8,
    )


def _large(batches: Sequence[str]) -> None:
    """Say that a step is dear for its batch alone."""
    warnings.warn(
        f"OCNOpt factorises a matrix of samples by samples for each layer; for {batches[0]} a step takes more than ten "
        'times as long as a plain one: use smaller batches, or form="sample", which grows with the batch as SGD does',
        stacklevel=8,
    )


def _unrecorded(names: Sequence[str]) -> None:
    """Say that a step was none of OCNOpt's own."""
    warnings.warn(
        "OCNOpt met gradients that no forward and backward pass of its model since the last step has made: this step "
        "is that of the first-order method; expected model(x) to be called as a whole, with gradients enabled",
        stacklevel=8,
    )
