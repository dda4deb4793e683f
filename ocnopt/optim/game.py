"""One step of the layers' game: terminal value, sweep, and the second forward pass in which the layers move.

A *turn* is a player with its block of parameters and the single samples' gradients. The samples of several forward
passes before one step count as one batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import shape
from ocnopt.differential import layers
from ocnopt.differential.layers import Answer, Answers, CostToGo, Gradients, joined, together
from ocnopt.differential.sweep import sweep
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.players import Plan, Player, gradients, pushed, seen
from ocnopt.neural.replay import Replay
from ocnopt.neural.tape import Tape, working
from ocnopt.optim.metrics import Base, Block

FORMS = ("batch", "sample", "gauss_newton")
GAMES: dict[str, Callable[[Sequence[Tensor], CostToGo], tuple[CostToGo, Answers]]] = {
    "open_loop": layers.open_loop,
    "feedback": layers.feedback,
    "cooperative": layers.cooperative,
}
Terminal = Callable[[Tensor, Tensor], Tensor]
# How much of the published factor p p^T stands beside the curvature of losses without units.
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
    """A player, what it moves, what its samples want, and what its gradient was multiplied by; None: it is another."""

    player: Player
    block: Block
    gradients: Gradients
    factor: float | None = 1.0


@dataclass
class Game:
    """The turns of some tapes of one plan, who else moves when, and why the loss was not recognised."""

    plan: Plan
    tapes: Sequence[Tape]
    turns: list[Turn]
    others: dict[int, list[Block]] = field(default_factory=dict)
    unknown: str = ""

    def groups(self, rules: Rules) -> list[list[Turn]]:
        """The turns by generation; those who cooperate are one group."""
        if self.turns and rules.game == "cooperative":
            return [self.turns]
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
    groups = game.groups(rules)
    end = _end(game, rules)
    plain = end.v  # the weights of the first-order method
    value, readouts = _sweep(groups, end, rules, base)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    cuts = {player.call: cut for player, cut in zip(game.plan.players, game.plan.cuts, strict=True)}
    replays = [Replay(tape, game.plan.order, game.plan.places) for tape in game.tapes]
    others, s, surroundings = _Others(game, base), None, game.tapes[0].surroundings
    surroundings.close()  # casts of weights that are about to move
    with surroundings.restored(), uncast(surroundings.device.type):
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
                w = w.nan_to_num().clamp_(0.0, rules.limit)
                weights[turn.block.name] = (answer.v, w)
                _move(turn, game.tapes, replays if s is not None else (), w - plain, rules.tikhonov, base)
    surroundings.close()
    others.rest()
    return weights


def uncast(device: str) -> AbstractContextManager[Any]:
    """No autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _move(
    turn: Turn, tapes: Sequence[Tape], replays: Sequence[Replay], change: Tensor, tikhonov: float, base: Base
) -> None:
    """Move a player by the gradient of samples whose weights are other than 1 by ``change``."""
    c = 1.0 if turn.factor is None else turn.factor
    found: Sequence[Tensor] = turn.gradients.add_weighted(_times(change, c), turn.block.gradients)
    if tikhonov:
        for tape, replay in zip(tapes, replays, strict=False):
            found = pushed(tape, turn.player, replay, tikhonov * c, found)
    base.move(turn.block, found)


def _sweep(groups: Sequence[Sequence[Turn]], end: CostToGo, rules: Rules, base: Base) -> tuple[CostToGo, list[Answers]]:
    """The sweep over all generations.

    Raises:
        NonFiniteError: it has left the finite numbers.
    """
    cause = None
    try:
        value, readouts = sweep(lambda group, value: _swept(group, value, rules, base), groups, end)
        # of players in open loop nothing reaches the value
        alone = [answer.v for group in readouts for answer in group] if rules.game == "open_loop" else []
        if all(math.isfinite(torch.linalg.vector_norm(v, math.inf)) for v in (value.v, *alone)):
            return value, readouts
    except torch.linalg.LinAlgError as error:
        cause = error
    raise NonFiniteError(
        "the cost-to-go holds NaN or infinity; expected finite numbers. Parameters are as before this step: catch this "
        "error to skip the batch; if it comes again, lower lr or scale the inputs"
    ) from cause


def _swept(group: Sequence[Turn], value: CostToGo, rules: Rules, base: Base) -> tuple[CostToGo, Answers]:
    """The step of the sweep over the players of one generation."""
    metrics = [(base.metric(turn.block), turn.gradients) for turn in group]
    if rules.form == "sample":
        if rules.game == "open_loop":  # M stands for Q_uu, so a player alone takes the first-order step
            return value, [Answer(value.v, None)] * len(group)
        return layers.sample(_scaled(group, [metric.squares(own) for metric, own in metrics]), value)
    return GAMES[rules.game](_scaled(group, layers.grams(metrics)), value)


def _scaled(group: Sequence[Turn], found: list[Tensor]) -> list[Tensor]:
    """N of gradients that were multiplied since."""
    return [_times(N, 1.0 if turn.factor is None else turn.factor) for turn, N in zip(group, found, strict=True)]


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


def _end(game: Game, rules: Rules) -> CostToGo:
    """The value at the end of the path: S = kappa (bend along the costate + scale), sample by sample."""
    factors = []
    for tape in game.tapes:
        kappa = _kappa(tape, rules.mean)
        bend, terminal = None, "gradient"
        reached = tape.reached()
        if len(reached) > 1:
            reached = {slot: p for slot, p in reached.items() if p.any()}
        if len(reached) == 1:
            ((slot, p),) = reached.items()
            x = tape.value(slot)
            terminal, bend = _bend(x, p.to(working(x)) * kappa, rules)
        elif rules.terminal not in ("auto", "gradient"):
            raise ProblemError(
                f"terminal={rules.terminal!r} met a loss of {len(reached)} outputs of the model; expected one, whose "
                'curvature it is: return what the loss uses as one tensor, or use terminal="gradient"'
            )
        if terminal == "gradient" and rules.terminal == "auto" and reached:
            game.unknown = (
                f"a loss of {len(reached)} outputs" if len(reached) > 1 else f"the loss of outputs {shape(x)}"
            )
        scale = _SCALES.get(terminal, 0.0) if rules.scale is None else rules.scale
        if bend is None:
            like = next(iter(tape.gradients.values()))
            bend = like.new_zeros(tape.rows, dtype=working(like))
        factors.append((bend + scale).mul_(kappa).sqrt_())
    R = joined(factors)
    return CostToGo(torch.ones_like(R), R)


def _bend(x: Tensor, p: Tensor, rules: Rules) -> tuple[str, Tensor | None]:
    """The loss, and p . H p / |p|^4 of each sample, H its Hessian; None where that is not known."""
    slack = max(1e-3, 4 * torch.finfo(x.dtype).eps)  # p is as coarse as the outputs were
    x = x.to(working(x))
    is_known = rules.terminal == "auto"
    terminal = _recognised(x, p, rules.mean, slack) if is_known else rules.terminal
    if terminal == "gradient":
        return terminal, None
    if isinstance(terminal, str):
        if not is_known and terminal in _IS_OF and not _IS_OF[terminal](x, p, rules.mean, slack):
            raise ProblemError(
                f"terminal={terminal!r} met gradients at the outputs, of shape {shape(x)}, that are not those of this "
                "loss; expected it alone, its mean or sum as reduction says, classes along axis 1, no weights, "
                'nothing ignored: use terminal="gradient", or a function that returns Hessian times p'
            )
        Hp: Any = LOSSES[terminal](x, p, rules.mean)
    else:
        Hp = terminal(x.clone(), p.clone())  # it may work in place
        if not isinstance(Hp, Tensor) or Hp.shape != p.shape:
            came = f"a tensor of shape {shape(Hp)}" if isinstance(Hp, Tensor) else type(Hp).__name__
            raise ProblemError(
                f"terminal returned {came}; expected the Hessian of each sample's loss times p, of shape {shape(p)}"
            )
        if not bool(Hp.isfinite().all()):
            raise NonFiniteError(
                "terminal returned NaN or infinity; expected finite numbers, the Hessian of each sample's loss times "
                "p, also where p is zero. Parameters are as before this step: catch this error to skip the batch"
            )
    flat = p.reshape(len(p), -1)
    size = torch.linalg.vecdot(flat, flat)  # whose square may be too small or too large a number
    bend = (torch.linalg.vecdot(Hp.reshape(flat.shape), flat) / size).div_(size)
    # where nothing pulls, nothing bends; a loss that bends down counts as straight
    bend = bend.nan_to_num_(nan=0.0, posinf=0.0).clamp_(min=0.0)
    return terminal if isinstance(terminal, str) else "", bend


def _recognised(x: Tensor, p: Tensor, mean: bool, slack: float) -> str:
    """The loss whose gradient p is; a probability as the target of a single logit is not told from other losses."""
    if _is_cross_entropy(x, p, mean, slack):
        return "cross_entropy"
    target = x.sigmoid() - _times(p, _share(x.shape[1:], mean))
    is_hard = torch.minimum(target.abs(), (target - 1).abs()).amax() < slack
    return "binary_cross_entropy" if bool(is_hard) else "gradient"


def _is_cross_entropy(x: Tensor, p: Tensor, mean: bool, slack: float) -> bool:
    """Whether p = softmax - target, for any target that sums to one."""
    if x.ndim < 2 or x.shape[1] < 2:
        return False
    p = _times(p, _share(x.shape[2:], mean))
    return float(p.sum(1).abs().amax()) < slack and float((x.softmax(1) - p).amin()) > -slack


def _is_binary_cross_entropy(x: Tensor, p: Tensor, mean: bool, slack: float) -> bool:
    """Whether p = sigmoid - target, for any target between 0 and 1."""
    low, high = (x.sigmoid() - _times(p, _share(x.shape[1:], mean))).aminmax()
    return bool((low > -slack) & (high < 1 + slack))


def _share(entries: torch.Size, mean: bool) -> float:
    """How many losses the loss of one sample is the mean of."""
    return float(entries.numel()) if mean else 1.0


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def _cross_entropy(x: Tensor, p: Tensor, mean: bool) -> Tensor:
    """H p of ``nn.CrossEntropyLoss``."""
    shares = x.softmax(1)
    curved = shares * (p - torch.linalg.vecdot(shares, p, dim=1).unsqueeze(1))
    return _times(curved, 1 / _share(x.shape[2:], mean))


def _binary_cross_entropy(x: Tensor, p: Tensor, mean: bool) -> Tensor:
    """H p of ``nn.BCEWithLogitsLoss``."""
    shares = torch.sigmoid(x)
    return shares * (1 - shares) * p / _share(x.shape[1:], mean)


def _squares(x: Tensor, p: Tensor, mean: bool) -> Tensor:
    """H p of ``nn.MSELoss``."""
    return 2 * p / _share(x.shape[1:], mean)


# p p^T is measured in 1 / loss: beside squares, or a curvature that the user gives, no number of it suits every scale.
_SCALES = {"cross_entropy": SHARE, "binary_cross_entropy": SHARE, "gradient": 1.0}
LOSSES: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "squares": _squares,
}
_IS_OF: dict[str, Callable[[Tensor, Tensor, bool, float], bool]] = {
    "cross_entropy": _is_cross_entropy,
    "binary_cross_entropy": _is_binary_cross_entropy,
}
