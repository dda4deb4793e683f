"""SNOpt: second-order training of models that contain Neural ODEs, as a drop-in torch optimiser.

Each matrix W of the model, of gradient G, has Kronecker factors A, B with eigenbases U_A, U_B, made anew now and then,
and moves in every iteration by

    M <- mu M + (1 - mu) G,    s <- beta s + (1 - beta) (U_B^T G U_A)^2,
    D = U_B [ U_B^T M U_A / (s + damping mean(s))^power ] U_A^T,
    W <- W - f lr l D / |D|,     l = |M| / sqrt(mean(s)) min(1, 64 / min(rows, columns))

with means that weigh all iterations alike at first. The division turns the step, l alone sets its length: that of M
over the root mean square of the layer's own gradients, so that lr is the root mean square change of an entry where
gradients agree, and noise shortens the step. The factor f follows the angles between steps and gradients. Wide sides
keep a few eigenvectors (:mod:`ocnopt.optim.bases`). All other parameters, biases of layers that are wide on both sides
among them, move by Adam's rule.

Where A and B come from:

    gradient      A = mean G^T G, B = mean G G^T, running means with the decay beta; of wide sides, M's leading part
    costate       from single samples, gathered by the backward passes of the Neural ODEs and of the layers around them
                  (:mod:`ocnopt.differential.kronecker`); no path is stored. Other matrices keep to "gradient".
    mixed         A of gradients, B of the costate's samples
    sampled       as costate, of targets drawn from the model's own output (:mod:`ocnopt.optim.sampling`)
    gauss_newton  likewise, of all columns of the output's curvature: as many backward passes as outputs

With power 1/2, l = |D| and f = 1 the first is SOAP (Vyas et al., arXiv 2409.11321), the second the rule of George et
al. (arXiv 1806.03884). The power is no higher than 1: the empirical Fisher falls with the square of the gradient. What
was published is close to ``curvature="costate", power=1, length="division", adaptation=0``.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_model
from ocnopt.differential.kronecker import Collector, Samples, is_layer, release
from ocnopt.errors import OcnoptError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim import lengths, matrices, states
from ocnopt.optim.blocks import Block, as_live, find_blocks, is_live, names_of
from ocnopt.optim.checks import check_fields, check_recipe, is_distributed
from ocnopt.optim.draw_checks import check_drawable, check_drawn, check_draws
from ocnopt.optim.gradient_checks import check_dense, check_norm
from ocnopt.optim.group_checks import add_group, check_groups, check_options_now, read_groups
from ocnopt.optim.lengths import Guard, Guards
from ocnopt.optim.matrices import Pair, in_full_precision
from ocnopt.optim.notices import warn_explosion, warn_first_order, warn_new_strangers, warn_unseen
from ocnopt.optim.ranks import Ranks, Shared, beside, unwrapped
from ocnopt.optim.sampling import cotangents, gather, joined
from ocnopt.optim.stack import Stack
from ocnopt.optim.stacks import Stacks
from ocnopt.optim.state_checks import check_state
from ocnopt.optim.step_hooks import with_hooks

# What a state brings back besides the options of the groups.
_OPTIONS = ("refresh_every", "curvature", "power", "adaptation", "length", "reduction", "everywhere")


class SNOpt(torch.optim.Optimizer):
    """Preconditions every matrix of a model in the eigenbasis of its Kronecker factors.

    Args:
        model: the module that is trained, or the DistributedDataParallel around it. With any curvature but "gradient"
            its NeuralODEs need ``adjoint="discrete"`` or ``"continuous"``.
        lr: learning rate; 0.01 is a good start, at any width.
        param_groups: parameters to train with options of their own, as in every torch optimiser; all of the model's
            parameters if left out, frozen ones as soon as they are set free. A layer takes its damping from the group
            of its weight.
        momentum: mu, of the running mean of gradients.
        weight_decay: gamma of the term (gamma/2) |p|^2 added to the loss.
        damping: relative to the mean of the second moments; 0 counts as the rounding of the precision on wide sides.
        refresh_every: gradients of a matrix from one refresh of its eigenbases to the next; the first ones come sooner.
            The sides of a matrix of which one is wide take turns.
        curvature: "gradient", "costate", "mixed", "sampled" or "gauss_newton": where the Kronecker factors come from,
            the last two by :meth:`sample`.
        power: of the division by the second moments.
        adaptation: kappa of a factor f of lr for each matrix, f <- f exp(kappa c), with c in [-1, 1] the cosine of its
            negative gradient and its last step: lr grows while steps lead on in the direction of the last one, and
            shrinks where they turn back. Parameters that are in no matrix share one. How f returns towards 1, what it
            does where gradients jump or vanish, and its bounds are in :mod:`ocnopt.optim.lengths`. adaptation=0 keeps f
            at 1, to which it returns from steps that are taken back.
        length: "noise" makes the step l long, "division" leaves it as the division has it, whatever the sides are.
        reduction: "mean" or "sum": how the loss of a backward pass combines its samples, so that batches of different
            size weigh alike. Chunks of unequal size whose losses are sums over the size of the whole batch are "sum":
            "mean" takes the size of each chunk for what its loss was divided by.
        everywhere: whether layers outside of NeuralODEs are preconditioned too.
        process_group: the processes that train the model together, each with its part of every batch; that of the
            DistributedDataParallel, else all, if left out. See :mod:`ocnopt.optim.ranks`.

    A step is taken back, with a warning for the first, and each f becomes a quarter, if after it the dearest solves of
    the NeuralODEs spend three times as many evaluations as in any of the last 50 iterations (of five at least), or the
    gradient is ten times as large as in any of them and points uphill along that step: of the parameters that have one.

    A ``torch.amp.GradScaler`` is used as with every torch optimiser: only directions and proportions of the samples
    enter, so that the scale of a loss does not matter, and a step that the scaler skips leaves no trace. What enters
    the factors belongs to the gradients that are in ``.grad`` at the step: several backward passes without
    ``zero_grad`` add up, and what ``zero_grad`` threw away is forgotten. Forward passes of equal size within a backward
    pass count as uses by the same samples: give others a backward pass each, or join them in one batch. Every sample
    of a batch counts, also one of weight 0 in the loss.

    Parameters without a gradient stay as they are with all that is known of them, so that parts may train in turn; what
    is usual is that of iterations with the same ones. A step without any gradient does nothing.

    A copy, by copy or pickle, trains the copy of the model that came with it; what is dropped lets go of its model.
    What is set free, and a matrix with other columns, begins with its next gradient as momentum and no f above 1.

    Raises:
        ProblemError: an argument is wrong, a NeuralODE cannot be observed, or parameters are sharded (FSDP).

    Source: Liu, Chen, Theodorou, "Second-order Neural ODE optimizer", arXiv 2109.14158.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> optimizer = SNOpt(model, lr=0.1, damping=0.0)
    >>> model(torch.ones(4, 1)).square().mean().backward()
    >>> optimizer.step()
    >>> print(f"{model.weight.item():.4f}")  # the first step has length lr
    0.9000
    """

    def __init__(
        self,
        model: nn.Module | Any,
        lr: float | Any = 0.01,
        *,
        param_groups: Iterable[dict[str, Any]] | Any | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-2,
        refresh_every: int | Any = 10,
        curvature: str | Any = "gradient",
        power: float | Any = 0.75,
        adaptation: float | Any = 3.0,
        length: str | Any = "noise",
        reduction: str = "mean",
        everywhere: bool | Any = True,
        process_group: Any | None = None,
    ) -> None:
        check_model(model)
        model, self._group = unwrapped(model, process_group) if is_distributed() else (model, process_group)
        self._model, self._guards, self._step_count, self.refresh_every = model, Guards(), 0, refresh_every
        self.curvature, self.power, self.adaptation = curvature, power, adaptation
        self.length, self.reduction, self.everywhere = length, reduction, everywhere
        check_recipe({name: getattr(self, name) for name in _OPTIONS})
        check_drawable(curvature)
        self._unseen: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._drawn: list[dict[nn.Module, Samples]] = []  # by sample(), for this step
        self._is_whole, self._is_ready = param_groups is None, False
        # All parameters: one that is frozen gets no gradient, and takes part once it is set free.
        groups = [{"params": model.parameters()}] if param_groups is None else read_groups(param_groups)
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping})
        check_groups(self.param_groups)
        self._start()
        warn_first_order([model] if everywhere else self._odes, self._blocks, self._trained)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_step_count", "_guards", "_unseen", "_is_whole", "_liveness", *_OPTIONS)
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_group", None)
        if "_model" in state:  # a copy; torch also sets a part of the state when it loads one
            self._start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model.

        Raises:
            ProblemError: an option is out of range, or a parameter is not one of the model's.
        """
        add_group(self, param_group, names_of(self._model))
        if self._is_ready:
            self._find_blocks()

    @with_hooks
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; parameters and state are those before the step.
            ProblemError: a gradient is sparse, an option of a group is out of range by now, :meth:`sample` was not
                called where the curvature needs it, or the processes are not about to take the same step.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        live = [(name, p) for p, name in self._trained.items() if is_live(p)]
        present = [gradient for _, gradient in check_dense(live)]
        self._is_new = bool(present) and [*map(is_live, self._trained)] != self._liveness
        if self._is_new:
            self._begin_anew()
        is_lacking = any(block.weight.grad is not None for block in self._due())
        check_drawn(self.curvature, any_drawn=bool(self._drawn) or not is_lacking)
        solved = [ode for ode, own in self._odes.items() if not own or any(p.grad is not None for p in own)]
        spent = sum(ode.read_most_evaluations() for ode in solved) if present else 0
        device = next((p.device for p in self._trained), torch.device("cpu"))
        ranks = beside(self._group) if is_distributed() else None
        if ranks is not None:
            spent = ranks.agree(present, [p for _, p in live] if self._is_due(0) else [], self._plan(), spent, device)
        check_options_now(self.param_groups)  # behind agree(): all ranks refuse them together
        if not present or self._is_due(0):
            warn_new_strangers(self._model, self._trained, self._unseen, whole=self._is_whole)
        if not present:
            return loss
        gradients = states.received(self.param_groups)
        guard = self._guards.of([p.grad is not None or not p.numel() for _, p in live])
        try:
            with in_full_precision(device.type):
                norm = self._stacks.gather(gradients, self.state, self._trained)
                check_norm(norm, live, gradients, self._step_count)
                if self._takes_back(gradients, guard, spent, norm):
                    return loss
                self._update(gradients, guard, ranks)
        finally:
            self._stacks.release()
        self._step_count += 1
        self._watch()
        return loss

    @property
    def factors(self) -> dict[str, float]:
        """The factors of lr as they stand, by the names of the parameters."""
        return {name: self.state.get(p, {}).get("factor", 1.0) for p, name in self._trained.items()}

    def sample(self, outputs: Tensor | Any, likelihood: str | Any, *, draws: int = 1) -> None:
        """Gather the curvature of the model's likelihood, where this iteration needs it; gradients are left alone.

        Args:
            outputs: of the model for this batch ``(B, ..., C)``, before ``loss.backward()``.
            likelihood: "categorical" for logits, "gaussian" for means.
            draws: backward passes of ``curvature="sampled"``.

        Raises:
            ProblemError: another curvature, no such outputs, or several processes.
        """
        check_draws(self.curvature, outputs, likelihood, draws, self._odes, self._collector)
        if self._due():
            columns = cotangents(outputs, likelihood, draws=None if self.curvature == "gauss_newton" else draws)
            self._drawn = gather(self._collector, outputs, columns, self._trained, self.reduction, self._drawn)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the parameters: tensors and plain numbers."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        saved = super().state_dict()
        saved["state"] = {index: states.in_own_memory(state) for index, state in saved["state"].items()}
        return {**saved, "step_count": self._step_count, "live": [*self._liveness], **self._guards.state(), **options}

    def load_state_dict(self, state_dict: Mapping[str, Any] | Any) -> None:
        """Go on from a state that :meth:`state_dict` returned; its options replace those of the constructor.

        Raises:
            ProblemError: the state is of another optimiser or model, damaged or out of range; nothing has changed.
        """
        check_state(state_dict, self.param_groups, names_of(self._model), self._blocks)
        options = {name: state_dict.get(name, getattr(self, name)) for name in _OPTIONS}
        check_recipe(options)
        before = {**self.__dict__}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        states.restore(self.param_groups, self.state, state_dict)
        self.__dict__.update(options, _step_count=state_dict["step_count"], _guards=Guards(state_dict))
        try:
            with as_live(self.param_groups, state_dict.get("live")):
                self._find_blocks()
            states.begin_anew(states.misfits(self.state, self._blocks))
        except OcnoptError:
            self.__dict__.update(before)
            self._watch()
            raise

    def _start(self) -> None:
        """Begin to watch, for as long as this optimiser is used."""
        self._handles, self._is_ready, self._is_new = [], True, False
        weakref.finalize(self, release, self._handles)
        with as_live(self.param_groups, self.__dict__.get("_liveness")):  # of a copy, as in its last step
            self._find_blocks()

    def _begin_anew(self) -> None:
        """Take in what was frozen or set free: what was gathered, and what is usual, is of other matrices."""
        former = {(*map(id, block.parameters),) for block in self._blocks}
        turned = [p for p, was_live in zip(self._trained, self._liveness, strict=True) if is_live(p) != was_live]
        self._find_blocks()
        self._guards.forget_gradients()
        changed = [block.parameters for block in self._blocks if (*map(id, block.parameters),) not in former]
        states.forget_changes(self.state.get(parameter, {}) for parameter in turned)
        states.begin_anew(self.state.get(p, {}) for p in itertools.chain(filter(is_live, turned), *changed))

    def _find_blocks(self) -> None:
        names = names_of(self._model)
        self._trained = {p: names.get(p, "no longer in the model") for g in self.param_groups for p in g["params"]}
        self._liveness = [*map(is_live, self._trained)]
        odes = [module for module in self._model.modules() if isinstance(module, NeuralODE)]
        self._odes = {ode: [p for p in ode.parameters() if p in self._trained and is_live(p)] for ode in odes}
        timed = {module for ode in self._odes for module in ode.field.modules()}
        if not self.everywhere:
            check_fields([*self._odes])
        self._blocks = [b for b in find_blocks(self._model, self._trained) if self.everywhere or b.layer in timed]
        self._scales: dict[Tensor, float] = {p: block.width_scale for block in self._blocks for p in block.parameters}
        self._sampled = [block for block in self._blocks if self._has_samples(block)]
        layers: dict[nn.Module, bool] = {block.layer: block.bias is not None for block in self._sampled}
        self._collector = Collector(layers, timed & layers.keys(), mean=self.reduction == "mean")
        self._drawn = []
        self._stacks = Stacks(self._blocks, {block.weight for block in self._sampled})
        self._watch()

    def _is_due(self, count: int, shift: int = 0) -> bool:
        """Whether the gradient after so many of a matrix refreshes its basis; for the first one by the steps so far."""
        return states.is_due(count or self._step_count, self.refresh_every, shift)

    def _due(self) -> list[Block]:
        """The matrices whose next gradient refreshes a basis that is made of samples."""
        return [b for b in self._sampled if self._is_due(int(self.state.get(b.weight, {}).get("step", 0)))]

    def _watch(self) -> None:
        """Watch the layers that need samples of the next iteration, and let go of all others."""
        release(self._handles)
        due = {block.layer for block in self._due()}
        if due:
            self._handles += self._collector.attach(due)
            self._handles += [o.observe(self._collector) for o in self._odes if not due.isdisjoint(o.field.modules())]

    def _plan(self) -> list[Any]:
        """What must be the same in all processes."""
        present = [p.grad is not None for p in self._trained if is_live(p)]
        options = [[group.get(key) for key in (*self.defaults, "initial_lr")] for group in self.param_groups]
        return [self._step_count, present, self._liveness, options, *(getattr(self, name) for name in _OPTIONS)]

    def _update(self, gradients: dict[Tensor, Tensor], guard: Guard, ranks: Ranks | None) -> None:
        """Refresh the eigenbases if it is time, and move all parameters that have gradients."""
        seen, drawn, self._drawn = self._collector.take(), self._drawn, []
        samples = joined(drawn) if drawn else seen
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        stacks = self._stacks.take_in(gradients, self.state, self._trained, groups)
        lengths.adapt(self._blocks, stacks, gradients, self.state, groups, float(self.adaptation), guard)
        self._learn(stacks, samples, ranks)
        scales = self._scales if self.length == "noise" else {}
        rates = {p: float(groups[p]["lr"]) * self.state[p].get("factor", 1.0) * scales.get(p, 1.0) for p in gradients}
        states.forget_changes(map(self.state.__getitem__, gradients))
        changes = matrices.changes(stacks, rates, groups, float(self.power), self.length)
        states.forget_squares(map(self.state.__getitem__, changes))
        rest = {p: gradient for p, gradient in gradients.items() if p not in changes}
        changes |= states.first_order(rest, self.state, rates)
        matrices.move(changes, self.state, self._step_count)

    def _takes_back(self, gradients: Iterable[Tensor], guard: Guard, spent: int, norm: float) -> bool:
        """Undo the last step of what has gradients, and shorten those that follow, if the guard objects to it."""
        known = [(p, self.state.get(p, {}).get("change")) for p in gradients]
        objection = guard.judge(spent, norm, [(p, change) for p, change in known if change is not None])
        if objection is None:
            return False
        lengths.take_back(gradients, self.state)
        self._drawn = []
        warn_explosion(self._step_count, objection, self._unseen)
        return True

    def _has_samples(self, block: Block) -> bool:
        return self.curvature != "gradient" and is_layer(block.layer)

    def _learn(self, stacks: Sequence[Stack], samples: Mapping[nn.Module, Samples], ranks: Ranks | None) -> None:
        """Take what an iteration says into the factors of all matrices."""
        due: list[tuple[Block, Pair]] = []
        for stack in stacks:
            is_gathered = self._has_samples(stack.blocks[0])
            if not is_gathered or self.curvature == "mixed":
                stack.observe()
            are_due = [self._is_due(count - 1, 0 if is_gathered else stack.shift) for count in stack.counts]
            if all(are_due) and ranks is None and stack.follow():
                continue
            for i, block in enumerate(stack.blocks):
                if stack.is_present[i] and (are_due[i] or not (is_gathered or stack.is_ready[i])):
                    pair = Pair(self.state[block.weight], *stack.pair(i))
                    due.append((block, pair))
        if not due:
            return
        found = [samples.get(block.layer) if self._has_samples(block) else None for block, _ in due]
        shared = None if ranks is None else Shared(ranks, [pair.gradient for _, pair in due])
        seen = [one is not None for one in found]
        if shared is not None and self.curvature != "gradient":
            found, seen = shared.pool(found)
        wanted = [i for i, (block, _) in enumerate(due) if self._is_shown(block, seen=seen[i])]
        matrices.refresh({i: (due[i][1], found[i]) for i in wanted}, shared, mixed=self.curvature == "mixed")
        for stack in stacks:
            stack.settle(self.state)

    def _is_shown(self, block: Block, *, seen: bool) -> bool:
        """Whether there is something to make an eigenbasis of, given whether there are samples."""
        has_basis = "moments" in self.state[block.weight]
        received = matrices.is_received(block.weight.grad)
        if not self._has_samples(block):
            return has_basis or received
        if received and not (seen or has_basis or self._is_new):
            warn_unseen(block.name, self._unseen)
        return seen
