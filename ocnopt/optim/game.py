"""One step of the layers' game: terminal value, sweep, and the second forward pass in which the layers move.

A *turn* is a player with its block of parameters and the single samples' gradients. The samples of several forward
passes before one step count as one batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.differential import layers
from ocnopt.differential.layers import CostToGo, Gradients, Readouts, joined, together
from ocnopt.differential.sweep import sweep
from ocnopt.errors import NonFiniteError
from ocnopt.neural.players import Plan, Player, gradients, pushed, seen
from ocnopt.neural.replay import Replay
from ocnopt.neural.tape import Tape, working
from ocnopt.optim.metrics import Base, Block

FORMS = ("batch", "sample", "gauss_newton")
GAMES: dict[str, Callable[[Sequence[Tensor], CostToGo], tuple[CostToGo, Readouts]]] = {
    "open_loop": layers.open_loop,
    "feedback": layers.feedback,
    "cooperative": layers.cooperative,
}
Terminal = Callable[[Tensor, Tensor], Tensor]
# The share of the published terminal factor beside the loss's own curvature, and all of it where that is unknown.
SHARE = 0.03


@dataclass(frozen=True)
class Rules:
    """How the game is played: see :class:`ocnopt.optim.ocnopt.OCNOpt`."""

    form: str
    game: str
    terminal: str | Terminal
    scale: float | None
    limit: float
    tikhonov: float
    mean: bool


class Turn(NamedTuple):
    """A player, what it moves, and what its samples want."""

    player: Player
    block: Block
    gradients: Gradients


@dataclass
class Game:
    """The turns of some tapes of one plan, and who else moves when."""

    plan: Plan
    tapes: Sequence[Tape]
    turns: list[Turn]
    others: dict[int, list[Block]] = field(default_factory=dict)

    def groups(self) -> list[list[Turn]]:
        """The turns by generation."""
        return [[*group] for _, group in groupby(self.turns, key=lambda turn: turn.player.generation)]


def gathered(player: Player, tapes: Sequence[Tape]) -> Gradients | None:
    """The gradients of a player's samples in all tapes; None where some have not reached it."""
    costates = [player.costate(tape) for tape in tapes]
    if any(costate is None for costate in costates):
        return None
    found = [gradients(tape, player, g) for tape, g in zip(tapes, costates, strict=True) if g is not None]
    return together(found)


def ends(player: Player, tapes: Sequence[Tape], *, mean: bool) -> tuple[Tensor, Tensor]:
    """Inputs of a player's samples, and the costates of each one's own loss at its outputs."""
    g = [costate * _kappa(tape, mean) for tape in tapes if (costate := player.costate(tape)) is not None]
    return torch.cat([seen(tape, player) for tape in tapes]), torch.cat(g)


def unscale(tapes: Sequence[Tape], parameters: Iterable[Tensor], scale: Tensor | None) -> None:
    """Divide what a backward pass has found by the scale of its loss."""
    if scale is None:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(1 / scale)
    for tape in tapes:
        tape.scale(1 / scale)


def _kappa(tape: Tape, mean: bool) -> float:
    """How many samples the loss of a pass is the mean of."""
    return float(tape.rows) if mean else 1.0


def play(game: Game, rules: Rules, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Move all blocks; for each turn what the samples weigh, without and with feedback."""
    groups = game.groups()
    value, readouts = _sweep(groups, _end(game.tapes, rules), rules, base)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    cuts = {player.call: cut for player, cut in zip(game.plan.players, game.plan.cuts, strict=True)}
    replays = [Replay(tape, game.plan.order, game.plan.places) for tape in game.tapes]
    others, s, surroundings = _Others(game, base), None, game.tapes[0].surroundings
    surroundings.close()  # casts of weights that are about to move
    with surroundings.restored(), torch.autocast(surroundings.device.type, enabled=False):
        for group, answers in zip(groups, readouts, strict=True):
            for place, (turn, answer) in enumerate(zip(group, answers, strict=True)):
                call = turn.player.call
                others.before(call)
                looks = rules.form != "gauss_newton" and (place == 0 or rules.game == "cooperative")
                if looks and (others.moved or weights):
                    for replay in replays:
                        replay.advance(call)
                    s = joined([replay.moved(cuts[call]) for replay in replays]).to(answer.v)
                w = value.v if rules.form == "gauss_newton" else answer.weights(s)
                w = w.nan_to_num(nan=0.0, neginf=0.0).clamp_(0.0, rules.limit)
                weights[turn.block.name] = (answer.v, w)
                _move(turn, game.tapes, replays if s is not None else (), w, rules.tikhonov, base)
    surroundings.close()
    others.rest()
    return weights


def _move(turn: Turn, tapes: Sequence[Tape], replays: Sequence[Replay], w: Tensor, tikhonov: float, base: Base) -> None:
    """Move a player by the gradient of samples that weigh w."""
    found: Sequence[Tensor] = turn.gradients.add_weighted(w - 1.0, turn.block.gradients)
    if tikhonov:
        for tape, replay in zip(tapes, replays, strict=False):
            found = pushed(tape, turn.player, replay, tikhonov, found)
    base.move(turn.block, found)


def _sweep(
    groups: Sequence[Sequence[Turn]], end: CostToGo, rules: Rules, base: Base
) -> tuple[CostToGo, list[Readouts]]:
    """The sweep over all generations.

    Raises:
        NonFiniteError: it has left the finite numbers.
    """
    cause = None
    try:
        value, readouts = sweep(lambda group, value: _swept(group, value, rules, base), groups, end)
        if bool(value.v.isfinite().all()):
            return value, readouts
    except torch.linalg.LinAlgError as error:
        cause = error
    raise NonFiniteError(
        "the cost-to-go holds NaN or infinity; expected finite numbers. Parameters are as before this step: catch this "
        "error to skip the batch; if it comes again, lower lr or scale the inputs"
    ) from cause


def _swept(group: Sequence[Turn], value: CostToGo, rules: Rules, base: Base) -> tuple[CostToGo, Readouts]:
    """The step of the sweep over the players of one generation."""
    metrics = [(base.metric(turn.block), turn.gradients) for turn in group]
    if rules.form == "sample":
        return layers.sample([metric.squares(own) for metric, own in metrics], value)
    return GAMES[rules.game]([metric.gram(own) for metric, own in metrics], value)


class _Others:
    """Blocks outside of the game: they move by the plain gradient when their first call comes."""

    def __init__(self, game: Game, base: Base) -> None:
        self._waiting = sorted(game.others.items(), key=lambda item: game.plan.places[item[0]])
        self._places, self._base = game.plan.places, base
        self.moved = False

    def before(self, call: int) -> None:
        """Move those whose call comes before this one, or with it."""
        while self._waiting and self._places[self._waiting[0][0]] <= self._places[call]:
            self._move()

    def rest(self) -> None:
        """Move all that are left."""
        while self._waiting:
            self._move()

    def _move(self) -> None:
        for block in self._waiting.pop(0)[1]:
            self._base.move(block, block.gradients)
        self.moved = True


def _end(tapes: Sequence[Tape], rules: Rules) -> CostToGo:
    """The value at the end of the path: S = kappa (bend along the costate + scale), sample by sample."""
    factors = []
    for tape in tapes:
        kappa = _kappa(tape, rules.mean)
        bend, scale = None, rules.scale
        reached = [slot for slot in dict.fromkeys(tape.returned) if slot in tape.gradients]
        if len(reached) == 1:
            x, p = tape.value(reached[0]), tape.gradients[reached[0]] * kappa
            bend = _bend(x.to(working(x)), p.to(working(x)), rules.terminal)
        if scale is None:
            scale = 1.0 if bend is None else SHARE
        like = next(iter(tape.gradients.values()))
        like = like.new_zeros(tape.rows, dtype=working(like))
        factors.append((kappa * (like + scale if bend is None else bend + scale)).sqrt())
    R = torch.cat(factors)
    v = torch.ones_like(R)
    return CostToGo(v, R if rules.form == "sample" else torch.diag(R))


def _bend(x: Tensor, p: Tensor, terminal: str | Terminal) -> Tensor | None:
    """p . H p / |p|^4 of each sample, H the Hessian of its loss; None where that is not known."""
    if terminal == "auto":
        Hp = _cross_entropy(x, p)
        Hp = _binary_cross_entropy(x, p) if Hp is None else Hp
    elif terminal == "gradient":
        Hp = None
    else:
        Hp = LOSSES[terminal](x, p) if isinstance(terminal, str) else terminal(x, p)
    if Hp is None:
        return None
    flat = p.reshape(len(p), -1)
    bend = (Hp.reshape(flat.shape) * flat).sum(1) / flat.square().sum(1).square()
    # where nothing pulls, nothing bends; a loss that bends down counts as straight
    return bend.nan_to_num_(nan=0.0, posinf=0.0).clamp_(min=0.0)


def _cross_entropy(x: Tensor, p: Tensor) -> Tensor | None:
    """H p of ``nn.CrossEntropyLoss`` if p = shares - target is its gradient, for any target that sums to one."""
    if x.ndim < 2 or x.shape[1] < 2:
        return None
    shares = x.softmax(1)
    target = shares - p
    if not bool(((target.sum(1) - 1).abs().amax() < 1e-3) & (target.amin() > -1e-3)):
        return None
    return shares * (p - (shares * p).sum(1, keepdim=True))


def _binary_cross_entropy(x: Tensor, p: Tensor) -> Tensor | None:
    """H p of ``nn.BCEWithLogitsLoss``, likewise."""
    shares, size = torch.sigmoid(x), x[0].numel()
    low, high = (shares - p * size).aminmax()
    return shares * (1 - shares) * p / size if bool((low > -1e-3) & (high < 1 + 1e-3)) else None


def _squares(x: Tensor, p: Tensor) -> Tensor:
    """H p of ``nn.MSELoss``."""
    return 2 * p / x[0].numel()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "squares": _squares,
}
