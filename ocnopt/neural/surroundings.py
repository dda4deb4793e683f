"""What a field sees besides its arguments, which a backward pass must see too."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ocnopt.neural import checks

Noise = tuple[Tensor, Tensor | None]


class Surroundings:
    """What a field sees besides its arguments, as it was in the forward pass."""

    def __init__(self, field: nn.Module, device: torch.device) -> None:
        self.field, self.device = field, device
        self.training = [(module, module.training) for module in checks.modules(field)]
        self.parameters = self.parameters_now()
        kinds = (kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind))
        self.autocast = {kind: _autocast(kind) for kind in kinds}
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def parameters_now(self) -> list[Tensor]:
        """The field's parameters; without the search for shared ones that ``field.parameters()`` spends its time on."""
        return [value for module, _ in self.training for value in module._parameters.values() if value is not None]

    def buffers_now(self) -> list[Tensor]:
        """The field's buffers, likewise."""
        return [value for module, _ in self.training for value in module._buffers.values() if value is not None]

    def note_buffers(self) -> None:
        """Note the values of the buffers."""
        self.buffers = [(buffer, buffer.clone()) for buffer in self.buffers_now()]

    def set_buffers(self) -> None:
        """Put them back; through .data, as batch normalisation moves its statistics without telling autograd."""
        for buffer, was in self.buffers:
            if not torch.equal(buffer, was):
                buffer.data.copy_(was)

    def still(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that stand where they stood when they were noted: those that the field itself does not move."""
        return [(buffer, was) for buffer, was in self.buffers if torch.equal(buffer, was)]

    def close(self) -> None:
        """The forward pass is over."""
        if any(enabled for enabled, _, _ in self.autocast.values()):
            # Weights that autocast has cast without a graph: later uses in the same region would lose gradients.
            torch.clear_autocast_cache()

    def noise(self) -> Noise:
        """The state of the random generators that a field may draw from."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def set_noise(self, noise: Noise) -> None:
        """Put the generators back."""
        torch.set_rng_state(noise[0])
        if noise[1] is not None:
            torch.cuda.set_rng_state(noise[1], self.device)

    def moved(self, noise: Noise) -> bool:
        """Whether random numbers were drawn since ``noise``."""
        now, before = self.noise(), noise[1]
        on_device = now[1] is not None and before is not None and not torch.equal(now[1], before)
        return on_device or not torch.equal(now[0], noise[0])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As in the forward pass; afterwards as before."""
        flags = [(module, flag) for module, flag in self.training if module.training != flag]
        noise, buffers = self.noise(), [(buffer, buffer.clone()) for buffer, was in self.buffers]
        try:
            for module, flag in flags:
                module.training = flag
            self.set_buffers()
            with self.autocasting():
                yield
        finally:
            for module, flag in flags:
                module.training = not flag
            self.set_noise(noise)
            for buffer, now in buffers:
                if not torch.equal(buffer, now):
                    buffer.data.copy_(now)

    def autocasting(self) -> ExitStack:
        """The autocast of the forward pass."""
        stack = ExitStack()
        for kind, was in self.autocast.items():
            if was != _autocast(kind):
                on, dtype, cached = was
                stack.enter_context(torch.autocast(kind, enabled=on, dtype=dtype, cache_enabled=cached))
        return stack


def _autocast(kind: str) -> tuple[bool, torch.dtype, bool]:
    """Whether autocast is on, to what it casts and whether it remembers."""
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
