"""SNOpt: second-order training of models with Neural ODEs.

On refresh iterations (the first, then one in ``refresh_every``) the backward passes of the Neural ODEs and of the layers around
them hand over the Kronecker factors of each layer, see :mod:`ocnopt.differential.kronecker`. In between, an iteration costs
four small matrix products a layer more than Adam's. With the gradient in the eigenbasis, Gt = U_B^T G U_A,

    m <- mu m + (1 - mu) Gt,   s <- beta s + (1 - beta) Gt^2,   W <- W - lr U_B (m / sqrt(s + damping mean(s))) U_A^T
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
import warnings

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.differential.kronecker import *
from ocnopt.differential.kronecker import Basis,Eigen,Layer,Collector
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE

MOMENTS_DECAY = 0.95
FACTORS_KEEP = 0.5
POWER = 0.5
INIT = "n"
CARRY = "carry"
CLIP = False
RANK = 128
EXTRA = ()


class _Block(NamedTuple):
    layer: Layer
    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None

    def gradient(self) -> Tensor | None:
        grads = [None if p is None else p.grad for p in (self.weight, self.bias)]
        if all(g is None for g in grads):
            return None
        w = grads[0] if grads[0] is not None else torch.zeros_like(self.weight)
        b = None if self.bias is None else grads[1] if grads[1] is not None else torch.zeros_like(self.bias)
        return as_matrix(self.layer, w, b)


class SNOpt(torch.optim.Optimizer):
    def __init__(self, model, lr, *, param_groups=None, momentum=0.9, weight_decay=0.0, damping=1e-3, refresh_every=100, curvature="empirical", reduction="mean", everywhere=True):
        self.reduction = reduction
        self.refresh_every = refresh_every
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        super().__init__(param_groups or [p for p in model.parameters() if p.requires_grad], defaults)
        self.odes = [m for m in model.modules() if isinstance(m, NeuralODE)]
        timed = {m for o in self.odes for m in o.field.modules()}
        self.blocks = [_Block(m, n, m.weight, m.bias) for n, m in model.named_modules() if is_layer(m) and m.weight.requires_grad]
        self.collector = Collector(model, {b.layer: b.bias is not None for b in self.blocks}, timed & {b.layer for b in self.blocks})
        self.step_count = 0
        self.handles = []
        self._watch()

    def _watch(self):
        for h in self.handles:
            h.remove()
        self.handles = []
        if self.step_count % self.refresh_every == 0 or self.step_count in EXTRA:
            self.handles = [*self.collector.attach(), *(o.observe(self.collector) for o in self.odes)]

    @torch.no_grad()
    def step(self, closure=None):
        groups = {p: g for g in self.param_groups for p in g["params"]}
        factors = self.collector.take() if self.handles else {}
        for b in self.blocks:
            G = b.gradient()
            if G is None:
                continue
            st = self.state[b.weight]
            if b.layer in factors:
                self._refresh(st, factors[b.layer], G)
            basis = Basis(Eigen(st["UA"], st["EA"]), Eigen(st["UB"], st["EB"]))
            if "m" not in st:
                st["m"] = G.clone()
            g = groups[b.weight]
            st["m"].lerp_(G, 1 - g["momentum"])
            turned, leading = basis.turn(torch.stack((G, st["m"])))
            st["s"].lerp_(basis.squares(turned[0], leading[0]), 1 - MOMENTS_DECAY)
            P = basis.precondition(turned[1], leading[1], st["s"], g["damping"], POWER)
            if CLIP:
                P = P / P.square().mean().sqrt().clamp(min=1.)
            if b.bias is not None:
                b.bias.sub_(P[..., -1].reshape(b.bias.shape), alpha=groups[b.bias]["lr"])
                P = P[..., :-1]
            b.weight.sub_(P.reshape(b.weight.shape), alpha=g["lr"])
        self.step_count += 1
        self._watch()

    def _refresh(self, st, f, G):
        if "UA" not in st:
            new = eigenbasis(f, RANK)
            st["s"] = first_moments(new, G)
        else:
            old = Basis(Eigen(st["UA"], st["EA"]), Eigen(st["UB"], st["EB"]))
            new = eigenbasis(f, RANK, old, FACTORS_KEEP)
            st["s"] = carried_moments(st["s"], old, new)
        st.update(UA=new.input.vectors, EA=new.input.values, UB=new.output.vectors, EB=new.output.values)
