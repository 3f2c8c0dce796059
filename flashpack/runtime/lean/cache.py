"""Keys and values with room for more: a token's are written behind the others, where the library would copy all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' growing layer over buffers [batch, KV heads, capacity, width]; ``keys`` and ``values`` are the
    part in use. What others assign to them becomes a buffer without room, until the next token."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[str, Tensor | None] = {"keys": None, "values": None}
        self._used = {"keys": 0, "values": 0}
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, layer: DynamicLayer, capacity: int) -> RoomyLayer:
        """With what ``layer`` holds."""
        made = cls(capacity)
        if layer.is_initialized and layer.keys is not None and layer.values is not None:
            made.lazy_initialization(layer.keys, layer.values)
            made.keys, made.values = layer.keys, layer.values
        return made

    def _get(self, name: str) -> Tensor | None:
        buffer = self._buffers[name]
        return None if buffer is None or buffer.ndim != 4 else buffer[:, :, : self._used[name]]

    def _set(self, name: str, value: Tensor | None) -> None:
        self._buffers[name] = value
        self._used[name] = value.shape[2] if value is not None and value.ndim == 4 else 0

    @property
    def batch(self) -> int:
        """How many sequences; 0 before the first token."""
        buffer = self._buffers["keys"]
        return 0 if buffer is None or buffer.ndim != 4 else buffer.shape[0]

    @property
    def length(self) -> int:
        """Tokens that are kept."""
        return self._used["keys"]

    keys: Any = property(lambda self: self._get("keys"), lambda self, value: self._set("keys", value))
    values: Any = property(lambda self: self._get("values"), lambda self, value: self._set("values", value))

    def room(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, with room for a token at least; to be counted with ``grow``."""
        both = []
        for name, buffer in self._buffers.items():
            assert buffer is not None
            if buffer.shape[2] <= self.length or not buffer.is_contiguous():
                batch, heads, _, width = buffer.shape
                capacity = max(self._capacity, self.length + self.length // 2 + 1)
                with torch.inference_mode(False):  # of use in both modes
                    larger = torch.empty(batch, heads, capacity, width, dtype=buffer.dtype, device=buffer.device)
                larger[:, :, : self.length] = buffer[:, :, : self.length]
                self._buffers[name] = buffer = larger
            both.append(buffer)
        return both[0], both[1]

    def grow(self) -> None:
        """A token's key and value have been written behind the others."""
        self._used = {name: used + 1 for name, used in self._used.items()}

    def cut(self, length: int) -> None:
        """Forget what comes after ``length`` tokens; the room stays."""
        self._used = {name: min(used, length) for name, used in self._used.items()}

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        elif key_states.shape[2] == 1:
            keys, values = self.room()
            keys[:, :, self.length], values[:, :, self.length] = key_states[:, :, 0], value_states[:, :, 0]
            self.grow()
        else:
            keys, values = (torch.cat(pair, dim=2) for pair in ((self.keys, key_states), (self.values, value_states)))
            self.keys, self.values = keys, values
        return self.keys, self.values
