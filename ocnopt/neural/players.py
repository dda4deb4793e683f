"""Which calls of a tape are layers that a sweep can minimise out, and what their samples saw.

A *player* is a call of a linear map, a convolution or a normalisation whose trained parameters act nowhere else. Calls
are taken in generations: a player belongs to the one after the latest among its inputs, everything else stays in that
of its inputs, so that players of one generation act on states of the same time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ocnopt.differential.layers import Gradients
from ocnopt.neural.replay import Replay
from ocnopt.neural.tape import Call, Slot, Tape, precise

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_ARGUMENTS: dict[Callable[..., Any], Sequence[str]] = {
    functional.linear: ("input", "weight", "bias"),
    **dict.fromkeys(_CONVOLUTIONS, _CONV),
    functional.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    functional.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    functional.instance_norm: (
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
}
# Of one layer, more single gradients than these many numbers are not spelt out.
LARGEST = 2**27


class Player(NamedTuple):
    """A layer: its call, its generation, its trained parameters by the name of the argument."""

    call: int
    generation: int
    parameters: dict[str, Tensor]

    def costate(self, tape: Tape) -> Tensor | None:
        """The gradient at its output; None where nothing reached it."""
        return tape.gradients.get(tape.calls[self.call].outputs[0] or 0)


class Plan(NamedTuple):
    """The game that a tape holds.

    Attributes:
        order: the calls in the order to take them.
        places: the place of each call in that order; what the module returned stands behind all.
        players: in that order.
        cuts: for each player the slots, one row a sample, that lead on when its turn comes.
        needed: the slots whose values a second pass needs.
        kept: the slots whose values or gradients it needs.
    """

    order: list[int]
    places: list[int]
    players: list[Player]
    cuts: list[list[int]]
    needed: frozenset[int]
    kept: frozenset[int]


def plan(tape: Tape) -> Plan:
    """Read the game from a tape."""
    met = Counter(id(parameter) for call in tape.calls for parameter in call.parameters)
    generations: list[int] = []
    players: list[Player] = []
    for place, call in enumerate(tape.calls):
        latest = max((generations[tape.maker[slot]] for slot in call.inputs), default=0)
        own = _own(tape, call) if call.parameters and all(met[id(p)] == 1 for p in call.parameters) else None
        if own is not None:
            players.append(Player(place, latest + 1, own))
        generations.append(latest + (own is not None))
    acting = {player.call for player in players}
    order = sorted(range(len(tape.calls)), key=lambda place: (generations[place], place not in acting))
    places = [0] * len(order) + [len(order)]
    for place, taken in enumerate(order):
        places[taken] = place
    players.sort(key=lambda player: places[player.call])
    cuts = [_cut(tape, places, places[player.call]) for player in players]
    needed = frozenset(tape.returned).union(*cuts)
    made = (slot for player in players for slot in tape.calls[player.call].outputs if slot is not None)
    return Plan(order, places, players, cuts, needed, needed.union(made))


def signature(tape: Tape) -> tuple[Any, ...]:
    """Equal for tapes of equal plans."""
    calls = ((call.function, *call.inputs, *map(id, call.parameters)) for call in tape.calls)
    return (*calls, *tape.shapes, *tape.returned, tape.rows)


def _cut(tape: Tape, places: list[int], now: int) -> list[int]:
    """The slots made before a place and used from there on."""
    return [
        slot
        for slot, uses in enumerate(tape.uses)
        if places[tape.maker[slot]] < now and any(places[use] >= now for use in uses) and tape.is_batched(slot)
    ]


def gradients(tape: Tape, player: Player, g: Tensor) -> Gradients:
    """The single samples' gradients of a player's parameters, for the costate g at its output."""
    call = tape.calls[player.call]
    given = arguments(call)
    z, g = _input(tape, given), precise(g.detach())
    z = z if z.dtype == g.dtype else z.to(g)
    has_weight, has_bias = "weight" in player.parameters, "bias" in player.parameters
    if call.function is functional.linear:
        if z.ndim == 2:
            return Gradients(z, g, bias=has_bias, weight=has_weight)
        z, g = z.flatten(1, -2), g.flatten(1, -2)
        of = [*([g.mT @ z] if has_weight else []), *([g.sum(1)] if has_bias else [])]
        return Gradients(of=of)
    if call.function in _CONVOLUTIONS:
        weight = [_convolved(given, z, g)] if has_weight else []
        return Gradients(of=[*weight, *([g.flatten(2).sum(2)] if has_bias else [])])
    shape = next(iter(player.parameters.values())).shape
    weight = [_over(g * _normalised(call, given, z), call, shape)] if has_weight else []
    return Gradients(of=[*weight, *([_over(g, call, shape)] if has_bias else [])])


def seen(tape: Tape, player: Player) -> Tensor:
    """A player's input in the recorded pass."""
    return _input(tape, arguments(tape.calls[player.call]))


def _input(tape: Tape, given: dict[str, Any]) -> Tensor:
    z = given["input"]
    return tape.value(z.index) if isinstance(z, Slot) else z.detach()


def pushed(tape: Tape, player: Player, replay: Replay, weight: float, totals: Sequence[Tensor]) -> Sequence[Tensor]:
    """Totals plus ``weight`` sum_i f_u^T f_x dx_i of a linear player, dx the change of its input."""
    call = tape.calls[player.call]
    given = arguments(call)
    z = given["input"]
    if (
        call.function not in (functional.linear, *_CONVOLUTIONS)
        or not isinstance(z, Slot)
        or isinstance(given["weight"], Slot)
    ):
        return totals
    moved = precise(replay.value(z.index) - tape.value(z.index))
    h = call.function(**{**given, "input": moved, "weight": given["weight"].to(moved), "bias": None})
    return gradients(tape, player, h).add_weighted(h.new_full((tape.rows,), weight), totals)


def arguments(call: Call) -> dict[str, Any]:
    """The arguments of a layer by name."""
    return {**dict(zip(_ARGUMENTS[call.function], call.args, strict=False)), **call.kwargs}


def _own(tape: Tape, call: Call) -> dict[str, Tensor] | None:
    """The trained parameters of a layer; None if the call is none, or if its samples cannot be told apart."""
    if call.function not in _ARGUMENTS or len(call.outputs) != 1 or call.outputs[0] is None:
        return None
    given = arguments(call)
    own = {name: given[name] for name in ("weight", "bias") if any(given.get(name) is p for p in call.parameters)}
    z = given["input"]
    shape = tape.shapes[z.index] if isinstance(z, Slot) else z.shape
    if len(own) != len(call.parameters) or len(shape) < 2 or shape[0] != tape.rows or not call.has_samples:
        return None
    if call.function is functional.layer_norm and len(given["normalized_shape"]) >= len(shape):
        return None  # over the samples too
    if call.function in _CONVOLUTIONS:
        weight = given["weight"]
        if len(shape) != len(tape.shapes[weight.index] if isinstance(weight, Slot) else weight.shape):
            return None
    spelt = call.function is not functional.linear or len(shape) > 2
    return None if spelt and tape.rows * sum(p.numel() for p in own.values()) > LARGEST else own


def _convolved(given: dict[str, Any], z: Tensor, g: Tensor) -> Tensor:
    """The weight's gradient of each sample."""
    dims = z.ndim - 2
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding, weight = given.get("padding", 0), given["weight"].detach().to(z)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        z = functional.pad(z, [end for span in reversed(spans) for end in (span // 2, span - span // 2)])
    pads = [0] * dims if isinstance(padding, str) else _each(padding, dims)
    groups = given.get("groups", 1)

    def one(z: Tensor, g: Tensor) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            g[None], z[None], weight, None, stride, pads, dilation, False, [0] * dims, groups, [False, True, False]
        )
        return found[1]

    return torch.func.vmap(one)(z, g)


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    found = [value] if isinstance(value, int) else [*value]
    return found * dims if len(found) == 1 else found


def _normalised(call: Call, given: dict[str, Any], z: Tensor) -> Tensor:
    """What weight and bias act on: the batch couples its samples there, and they count as they came out."""
    plain = {**given, "input": z, "weight": None, "bias": None}
    if plain.get("training") or plain.get("use_input_stats"):
        plain |= {"running_mean": None, "running_var": None}
    for name in ("running_mean", "running_var"):
        if plain.get(name) is not None:
            plain[name] = plain[name].to(z)
    return call.function(**plain)


def _over(values: Tensor, call: Call, shape: torch.Size) -> Tensor:
    """Sum over the places that one entry of a normalisation's weight acts on."""
    if call.function is functional.layer_norm:
        return values.reshape(values.shape[0], -1, *shape).sum(1)
    return values.flatten(2).sum(2) if values.ndim > 2 else values
