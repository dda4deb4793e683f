r"""OCNOpt: layer-wise feedback for feed-forward, residual and inception networks, as a drop-in torch optimiser.

The forward pass is recorded (:mod:`ocnopt.neural.tape`), the user's backward pass finds the costates, a sweep over the
layers the cost-to-go in their span (:mod:`ocnopt.differential.layers`). Then the layers move from the first to the
last (:mod:`ocnopt.optim.game`): each meets the states that the layers before it make by now, and answers to them,

    du_t = -M^-1 sum_i w_i dL_i/du_t,    w = v_t + S_t s_t,    s_t,i = costate . change of state i,

where w = 1 is the step of the first-order method whose metric is M (:mod:`ocnopt.optim.metrics`).
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_choice, check_model, check_number
from ocnopt.differential.kronecker import Layer, is_gone, is_layer, release
from ocnopt.neural.players import Plan, Player, plan, signature
from ocnopt.neural.tape import Recorder, Tape
from ocnopt.optim.blocks import names_of
from ocnopt.optim.checks import check_not_parallel, check_one_process
from ocnopt.optim.game import FORMS, GAMES, LOSSES, Game, Rules, Terminal, Turn, ends, gathered, play, uncast, unscale
from ocnopt.optim.game_checks import (
    check_game,
    check_outputs,
    check_saved,
    check_scale,
    check_shapes,
    check_tapes,
)
from ocnopt.optim.gradient_checks import check_gradients
from ocnopt.optim.group_checks import add_group, check_groups, check_options_now, read_groups
from ocnopt.optim.metrics import BASES, SHARED, Block, restore
from ocnopt.optim.notes import Notes
from ocnopt.optim.received import Received, factor
from ocnopt.optim.watch import Watch

_PLANS = 64
_OPTIONS = ("lr", "momentum", "weight_decay", "decay", "eps", "damping")  # torch adds defaults of its own


class OCNOpt(torch.optim.Optimizer):
    """A first-order method whose layers answer to what the layers before them have just changed.

    Args:
        model: the module that is trained; its linear layers, convolutions and normalisations are the players. Its
            forward pass may be any torch code: branches, skip connections, control flow, functional layers.
        lr: learning rate, that of the first-order method; feedback bears larger ones.
        curvature: the method whose metric M stands for the layers' own curvature: "identity" ``torch.optim.SGD``,
            "adaptive" ``torch.optim.Adam``, "kronecker" KFAC in the reduce form.
        feedback: False is that method itself, to the last bit.
        game: how layers act that meet the same states (a residual branch and its projection, branches of an inception
            block): "cooperative" they minimise jointly, "feedback" each answers to the past alone, "open_loop" none
            reckons with the others and nothing is fed back, anywhere.
        form: "batch": exact over the batch, in the span of the samples' costates; "sample": as published, sample by
            sample with M in place of Q_uu; "gauss_newton": the joint step of all (cooperative) layers in one pass.
        terminal: the loss's curvature along its gradient, which the backward pass does not tell: "cross_entropy",
            "binary_cross_entropy" (from logits), "squares" (``nn.MSELoss``), a function of the outputs x and the
            samples' gradients p, both of the outputs' shape, that returns the Hessian of each sample's loss times p, or
            "gradient", the published factor p p^T alone. "auto" recognises the first two by their gradients (the second
            by targets 0 and 1), else takes the last and warns: of weights of classes or samples, an ignore_index,
            logits flattened outside of the model, probabilities in place of logits, squares. To a cross entropy times
            c < 1 it gives 1/c times its curvature. Outputs that the loss does not use do not matter.
        scale: how much of p p^T, measured in 1 / loss, stands beside that curvature; if left out 0.03 beside the cross
            entropies, 0 beside squares and functions, 1 where there is no other.
        limit: the largest weight w of a sample; the smallest is 0.
        tikhonov: eps of the published V_xx + eps I, for form="sample".
        momentum: of the first-order method; beta_1 of Adam.
        weight_decay: gamma of the term (gamma/2) |p|^2 added to the loss.
        decay: of the running means of squares (Adam's beta_2) and of Kronecker factors.
        eps: of Adam.
        damping: of the Kronecker metric; its root is added to both factors.
        reduction: "mean" or "sum": how the loss of one forward pass combines its samples.
        param_groups: parameters to train with options of their own; all of the model's if left out. Weight and bias of
            a layer move as one where lr, decay, eps and damping are equal.

    Samples lie along the leading axis of everything that the players see. Parameters that are used twice, or by other
    operations than those of the players, move by the plain step of the first-order method, and a warning names them
    once. Batch normalisation couples samples; the sum of their costates is exact, the single ones are not. Unnoticed
    and wrong: another leading axis that is as long as the batch (time first, as many steps as samples), and samples
    that the model puts into another order.

    Several forward and backward passes before one step count as one batch; what ``zero_grad`` threw away is forgotten.
    That is exact for reduction="sum" and losses that are sums, and for means over passes of equal size followed by
    ``p.grad /= passes``; a mean divided before its backward pass is taken for a loss of other curvature. Gradients may
    be multiplied by a number for each layer, as clipping does: it takes the step of so many times lr. What further
    terms of the loss add in the same backward pass stays, feedback is added to it; of other changes a warning tells.

    A step takes B^3 operations for each layer, B samples: a warning says where that is ten times a plain step.

    Attributes:
        answers: for each player of the last step the weights v (without feedback) and w of its samples.

    Raises:
        ProblemError: an argument is wrong, the model cannot be recorded, or it is trained by several processes.

    Source: Liu, Chen, Theodorou, DDPNOpt (arXiv 2002.08809), DGNOpt (2105.03788), OCNOpt (2510.14168).

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> optimizer = OCNOpt(model, lr=1.0, terminal="squares", scale=0.0)
    >>> model(torch.ones(1, 1, dtype=torch.float64)).square().mean().backward()
    >>> optimizer.step()
    >>> print(f"{model.weight.item():.4f}")  # Gauss-Newton: w - 2 w / (1 / lr + 2)
    0.3333
    """

    def __init__(
        self,
        model: nn.Module | Any,
        lr: float | Any,
        *,
        curvature: str = "identity",
        feedback: bool | Any = True,
        game: str = "cooperative",
        form: str = "batch",
        terminal: str | Terminal | Any = "auto",
        scale: float | None = None,
        limit: float = 2.0,
        tikhonov: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: float = 0.999,
        eps: float = 1e-8,
        damping: float = 1e-2,
        reduction: str = "mean",
        param_groups: Iterable[dict[str, Any]] | Any | None = None,
    ) -> None:
        check_model(model, "OCNOpt(model, lr=0.1)")
        check_not_parallel(model)
        check_choice("curvature", curvature, tuple(BASES))
        check_choice("game", game, tuple(GAMES))
        check_choice("form", form, FORMS)
        check_choice("reduction", reduction, ("mean", "sum"))
        if not callable(terminal):
            check_choice("terminal", terminal, ("auto", "gradient", *LOSSES))
        check_game(model, feedback, form, game, tikhonov)
        if scale is not None:
            check_number("scale", scale, "a number >= 0")
        check_number("limit", limit, "a number >= 1", above=1.0)
        check_number("tikhonov", tikhonov, "a number >= 0")
        self._model, self._curvature, self._feedback, self._is_whole = model, curvature, feedback, param_groups is None
        self._rules = Rules(form, game, terminal, scale, float(limit), float(tikhonov), reduction == "mean")
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay": decay, "eps": eps}
        whole = [{"params": model.parameters()}]
        super().__init__(whole if param_groups is None else read_groups(param_groups), {**options, "damping": damping})
        check_groups(self.param_groups)
        self._start()

    def _start(self) -> None:
        """Begin to record, for as long as this optimiser is used."""
        self._base = BASES[self._curvature]()
        self._tapes: list[Tape] = []
        self.answers: dict[str, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, str] = {}
        self._layers: dict[int, Layer] = {}
        self._plans: dict[object, Plan] = {}
        self._notes, self._received, self._is_new = Notes(), Received(), True
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, release, self._handles)
        if self._feedback or self._curvature == "kronecker":
            watch = Watch(self)
            self._handles.append(self._model.register_forward_pre_hook(watch.begin, with_kwargs=True))
            # recordings are nested: the last to begin is the first to end
            self._handles.append(self._model.register_forward_hook(watch.end, always_call=True, prepend=True))

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_curvature", "_feedback", "_rules", "_is_whole")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:  # a copy; torch also sets a part of the state when it loads one
            self._start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model.

        Raises:
            ProblemError: an option is out of range, or a parameter is not one of the model's.
        """
        add_group(self, param_group, names_of(self._model))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            ProblemError: the state is another optimiser's, that of other rules, or of parameters of other shapes.
        """
        check_saved(state_dict, _OPTIONS, self._chosen(), self.param_groups)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        restore(self.state, self.param_groups, state_dict)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the parameters, and the rules that it belongs to."""
        return {**super().state_dict(), **self._chosen()}

    def _chosen(self) -> dict[str, str]:
        rules = self._rules
        terminal = rules.terminal if isinstance(rules.terminal, str) else "a function"
        return {"curvature": self._curvature, "form": rules.form, "game": rules.game, "terminal": terminal}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; parameters and state are those before the step. Or the
                cost-to-go is, or what ``terminal`` returned; then parameters are, but running means know the batch.
            ProblemError: a gradient is sparse, other processes run beside this one, the loss is not that of
                ``terminal``, an option of a group is out of range by now, a parameter has another shape than its
                state, or the passes before this step took different ways through the model.
        """
        check_one_process()
        check_options_now(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tapes, self._tapes = self._tapes, []
        received, self._received = self._received, Received()
        groups = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        if not self._names.keys() >= {*map(id, groups)}:
            self._names = {id(p): name for name, p in self._model.named_parameters()}
            self._layers = {id(m.weight): m for m in self._model.modules() if is_layer(m)}
        if self._is_new or not groups or not self._handles:
            self._is_new = False
            trained = {id(p) for group in self.param_groups for p in group["params"]}
            self._notes.strangers(self._model, trained, whole=self._is_whole)
        if not self._unscale(tapes, groups):
            return loss
        norms = check_gradients((self._names.get(id(p), "no longer in the model"), p) for p in groups)
        is_touched = received.look(norms)
        device = next((p.device.type for p in groups), "cpu")
        with uncast(device):
            self._move(tapes, groups, is_touched)
        for tape in tapes:  # whose graph may live on
            tape.forget()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Says to torch's GradScaler that gradients are unscaled here, as costates must be with them."""
        return bool(self._handles)

    def _unscale(self, tapes: list[Tape], groups: Iterable[Tensor]) -> bool:
        """Undo what a GradScaler has done to the loss; whether there is a step to take."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is None:
            return True
        if bool(found):
            return False
        check_scale(tapes, scale)
        unscale(tapes, groups, scale)
        return True

    def _move(self, tapes: list[Tape], groups: Mapping[Tensor, dict[str, Any]], is_touched: bool) -> None:
        game, blocks = None, []
        apart: list[Turn] = []
        check_outputs(tapes)
        if self._handles and groups and not tapes:
            self._notes.unrecorded()
        tapes = [tape for tape in tapes if tape.rows]
        if tapes:
            read = tapes[0].plan
            check_tapes(tapes)
            for tape in tapes:
                tape.check(read.needed)
            found = (self._turn(player, tapes, groups, is_touched) for player in read.players)
            turns = [turn for turn in found if turn is not None]
            apart = [turn for turn in turns if turn.factor is None]
            game = Game(read, tapes, [turn for turn in turns if turn.factor is not None])
            for tape in tapes:  # the costates at the players' outputs live on in their gradients, often far smaller
                tape.gradients = {slot: tape.gradients[slot] for slot in read.needed if slot in tape.gradients}
            blocks = [turn.block for turn in turns]
        taken = {id(parameter) for block in blocks for parameter in block.parameters}
        alone = [self._block([p], groups) for p in groups if id(p) not in taken]
        for block in (*blocks, *alone):
            self._base.observe(block)
        self.answers = {}
        if game is None or not self._feedback:
            for block in (*blocks, *alone):
                self._base.move(block, block.gradients)
            return
        if alone:
            first = {id(p): i for i in reversed(range(len(tapes[0].calls))) for p in tapes[0].calls[i].parameters}
            self._notes.alone(alone, first, game)
            for block in alone:
                game.others.setdefault(first.get(id(block.parameters[0]), len(first)), []).append(block)
        for turn in apart:
            game.others.setdefault(turn.player.call, []).append(turn.block)
        self._notes.rescaled(apart)
        self.answers = play(game, self._rules, self._base)
        self._notes.game(game, self._rules)

    def _turn(
        self, player: Player, tapes: list[Tape], groups: Mapping[Tensor, dict[str, Any]], is_touched: bool
    ) -> Turn | None:
        """A player with what it moves: the parameters that have a gradient and the metric of the first of them."""
        options = [groups.get(p) for p in player.parameters.values()]
        first = next((group for group in options if group is not None), {})
        own = {
            name: p
            for (name, p), group in zip(player.parameters.items(), options, strict=True)
            if group is first or (group is not None and all(group[key] == first[key] for key in SHARED))
        }
        if len(own) != len(player.parameters):
            player = player._replace(parameters=own)
        found = gathered(player, tapes) if own else None
        if found is None:
            return None
        block = self._block([*own.values()], groups)
        if self._curvature == "kronecker" and "weight" in own:
            layer = self._layers.get(id(own["weight"]))
            block.seen = None if layer is None else (layer, *ends(player, tapes, mean=self._rules.mean))
        if not is_touched or not self._feedback:
            return Turn(player, block, found)
        coarse = max(torch.finfo(g.dtype).eps for tape in tapes if (g := player.costate(tape)) is not None)
        return Turn(player, block, found, factor(found, block.gradients, coarse))

    def _block(self, parameters: list[Any], groups: Mapping[Tensor, dict[str, Any]]) -> Block:
        name, states = self._names.get(id(parameters[0]), "no longer in the model"), [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            check_shapes(self._names.get(id(parameter), name), parameter, state)
        return Block(name, parameters, states, [groups[p] for p in parameters], [p.grad for p in parameters])

    def _plan(self, tape: Tape) -> Plan:
        key = signature(tape)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan(tape)
            self._is_new = True
        return self._plans[key]

    def begin(self, tape: Tape) -> Recorder:
        """A recorder for one forward pass, which does not keep this optimiser alive."""
        weak = weakref.ref(self)

        def begun(tape: Tape) -> None:
            optimizer = weak()
            if optimizer is not None:
                optimizer._arrive(tape)

        return Recorder(tape, {id(p): p for group in self.param_groups for p in group["params"]}, begun)

    def end(self, tape: Tape) -> None:
        """A recording is complete: keep what a step needs."""
        if tape.rows:
            tape.plan = self._plan(tape)
            tape.keep(tape.plan.kept)
        else:
            self._is_new = True

    def _arrive(self, tape: Tape) -> None:
        """A backward pass has reached a tape, which counts if gradients reach parameters."""
        trained = [p for group in self.param_groups for p in group["params"]]
        if self._tapes and all(is_gone(p.grad) for p in trained):
            for gone in self._tapes:
                gone.forget()
            self._tapes, self._received = [], Received()
        received = self._received
        received.begin()
        before = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in trained]

        def over() -> None:
            counts = any(p.grad is not g or (g is not None and g._version != version) for p, g, version in before)
            tape.settle(counts=counts)
            if counts:
                received.note(trained)
                if tape not in self._tapes:
                    self._tapes.append(tape)

        torch.autograd.Variable._execution_engine.queue_callback(over)
