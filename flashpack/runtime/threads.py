"""Keeping results independent of the number of threads.

torch cuts an elementwise operation into one piece per thread, and the last values of a piece may go through another
implementation of exp than the others; sums may be cut, too. So the model's own operations run on one thread, and
only what is known to be independent runs on all of them: flashpack's kernels, and scaled dot product attention,
whose rows are computed each by one thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "packed_sdpa"  # a name with "flash" in it would be taken for flash attention

_threads = 1  # of the model whose forward runs now; torch's own count is as global as this


def _attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    torch.set_num_threads(_threads)
    try:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(*args, **kwargs)
        return output
    finally:
        torch.set_num_threads(1)


def confine(model: PreTrainedModel, threads: int) -> None:
    """Run the operations of ``model`` on one thread, attention on ``threads``; torch's count is restored after."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    outside: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        global _threads
        outside.append(torch.get_num_threads())
        _threads = threads
        torch.set_num_threads(1)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        torch.set_num_threads(outside.pop())

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
