"""Families whose experts transformers computes without its experts hook: stand-ins that have it, or why there is none.

A stand-in takes the place of one module in the model on the meta device. Its routed experts are an ``Experts``
module, which looks like any other experts module of transformers: nothing else in flashpack knows of these families.
Where its parameters are not called as in checkpoints, the adapter has the loader map that transformers lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flashpack.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Experts(nn.Module):
    """Gated experts behind the hook: ``gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I], on the meta device."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self, config: PretrainedConfig, act_fn: nn.Module, like: Tensor, experts: int, inner: int) -> None:
        """``config`` is the model's; ``like``: a parameter of the replaced module, with the type of theirs."""
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.act_fn = act_fn
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(like.new_empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(like.new_empty(experts, hidden, inner))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.act_fn(gate) * up
        return result

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden]."""
        run: Any = ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation]
        result: Tensor = run(self, x, index, weights)
        return result

    @staticmethod
    def loader_map(config: Any) -> list[WeightConverter]:
        """What transformers' loader does not know of the checkpoints of ``config``."""
        return []


@dataclass(frozen=True)
class Unstack:
    """An operation of a loader map: [E * rows, width] -> [E, rows, width]."""

    experts: int

    @property
    def reverse_op(self) -> Flatten:
        """What undoes it."""
        return Flatten()


class Flatten:
    """An operation of an export: [E, rows, width] -> [E * rows, width], of each tensor."""

    def convert(self, tensors: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """``tensors`` by pattern."""
        return {pattern: tensor.flatten(0, 1) for pattern, tensor in tensors.items()}


class Bind:
    """An operation of an export: E tensors -> one [E, ...]."""

    def convert(
        self, tensors: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        """``tensors`` by pattern of the source -> by pattern of the target."""
        return {target_patterns[0]: torch.stack([tensors[pattern][0] for pattern in source_patterns])}


class Unbind:
    """An operation of a loader map: one tensor [E, ...] -> E tensors."""

    @property
    def reverse_op(self) -> Bind:
        """What undoes it."""
        return Bind()

    def convert(self, tensors: dict[str, list[Tensor]], target_patterns: list[str], **_: Any) -> dict[str, Tensor]:
        """``tensors`` by pattern of the source -> by pattern of the target."""
        ((stack,),) = tensors.values()
        return dict(zip(target_patterns, stack.unbind(0), strict=True))


class Kept(nn.Linear):
    """A router's matrix: it keeps its stored type, and the model may read its ``weight``."""


class Llama4Experts(Experts):
    """``Llama4TextExperts``."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__(config, old.act_fn, old.down_proj, old.num_experts, old.expert_dim)

    @staticmethod
    def loader_map(config: Any) -> list[WeightConverter]:
        """One tensor per layer with rows and columns exchanged (Meta's form), or the experts' own as they are, one
        by one (quantizers') or stacked (MLX's)."""
        both, down = (f"feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj"))
        single, stacked = (
            [f"feed_forward.experts{expert}.{name}_proj.weight" for name in ("gate", "up", "down")]
            for expert in (".*", "")
        )
        return [
            WeightConverter(both, both, [Transpose(1, 2)]),
            WeightConverter(f"{down}$", down, [Transpose(1, 2)]),
            WeightConverter(single[:2], both, [MergeModulelist(0), Concatenate(1)]),
            WeightConverter(single[2], down, [MergeModulelist(0)]),
            WeightConverter(stacked[:2], both, [Concatenate(1)]),
            WeightConverter(stacked[2], down, [Concatenate(1)]),
        ]


class Llama4Moe(nn.Module):
    """``Llama4TextMoe``: the router's weight scales what goes into an expert, not what comes out."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__()
        self.top_k = old.top_k
        self.experts = Llama4Experts(old.experts, config)
        self.router = old.router
        self.shared_expert = old.shared_expert

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, hidden] -> [batch * tokens, hidden] and the router's logits."""
        x = x.reshape(-1, x.shape[-1])
        scores, logits = self.router(x)
        index = logits.topk(self.top_k, dim=1).indices
        # Each choice of a token is a row of its own.
        scaled = (x[:, None] * scores.gather(1, index)[..., None]).flatten(0, 1)
        outputs = self.experts(scaled, index.reshape(-1, 1), torch.ones_like(scaled[:, :1]))
        total = self.shared_expert(x)
        for output in outputs.view(len(x), self.top_k, -1).unbind(1):
            total = total + output
        return total, logits


class DbrxExperts(Experts):
    """``DbrxExperts``: matrices of all experts below each other, the last one transposed."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__(config, old.mlp.activation_fn, old.mlp.w1, old.num_experts, old.ffn_hidden_size)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [batch, tokens, hidden] -> [batch, tokens, hidden]."""
        return super().forward(x.flatten(0, 1), index, weights).view_as(x)

    @staticmethod
    def loader_map(config: Any) -> list[WeightConverter]:
        """Two matrices of all experts for gate and up, and down as [E * I, H]."""
        apart: Any = Unstack(config.ffn_config.moe_num_experts)
        gate, up, down = (f"experts.mlp.{name}" for name in ("w1", "v1", "w2"))
        return [
            WeightConverter([gate, up], "experts.gate_up_proj", [apart, Concatenate(1)]),
            WeightConverter(down, "experts.down_proj", [apart, Transpose(1, 2)]),
        ]


class LongcatExperts(Experts):
    """``LongcatFlashExperts``: experts past the last one with weights return what they are given."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__(config, old.act_fn, old.down_proj, old.num_routed_experts, old.intermediate_size)
        self.without_weights = range(old.num_routed_experts, old.total_experts)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden]."""
        same = (weights * (index >= self.num_experts)).sum(-1, keepdim=True)
        return super().forward(x, index, weights) + (x * same).to(x.dtype)


class Step3p7Experts(Experts):
    """``Step3p7Experts``: a gate of its own, clamped differently in each layer."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__(config, old.act_fn, old.down_proj, old.num_experts, old.intermediate_dim)
        self._limit = old.limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.act_fn(gate).clamp(max=self._limit) * up.clamp(-self._limit, self._limit)
        return result


class JetMoeExperts(Experts):
    """The experts of ``JetMoeMoE``."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        like = old.input_linear.weight
        super().__init__(config, old.activation, like, len(like), old.hidden_size)

    @staticmethod
    def loader_map(config: Any) -> list[WeightConverter]:
        """Other names; matrices of attention, a stack in the checkpoint, become Linears of their own."""
        apart: Any = Unbind()
        stacks = [f"self_attention.experts.{name}_linear" for name in ("input", "output")]
        return [
            WeightConverter("mlp.input_linear.weight", "mlp.experts.gate_up_proj", [Concatenate(1)]),
            WeightConverter("mlp.output_linear.weight", "mlp.experts.down_proj", [Concatenate(1)]),
            *(
                WeightConverter(f"{s}.weight", [f"{s}.{e}.weight" for e in range(config.num_local_experts)], [apart])
                for s in stacks
            ),
        ]


def _jetmoe_route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, hidden] -> the router's logits [tokens, experts], index and weights [tokens, top_k]."""
    logits = router.layer(x).float()
    top, index = logits.topk(router.top_k, dim=1)
    return logits, index, top.softmax(1).type_as(x)


class JetMoe(nn.Module):
    """``JetMoeMoE``."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__()
        self.router, self.bias = old.router, old.bias
        self.experts = JetMoeExperts(old, config)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden] -> [batch, tokens, hidden]."""
        flat = x.flatten(0, 1)
        _, index, weights = _jetmoe_route(self.router, flat)
        result: Tensor = self.experts(flat, index, weights).view_as(x) + self.bias
        return result


class JetMoeAttention(nn.Module):
    """``JetMoeMoA``: experts that make queries and outputs of attention. They are in memory, like other attention."""

    def __init__(self, old: Any, config: PretrainedConfig) -> None:
        super().__init__()
        self.router, self.bias = old.router, old.bias
        self.input_linear, self.output_linear = (
            nn.ModuleList(nn.Linear(m.input_size, m.output_size, False, "meta", m.weight.dtype) for _ in m.weight)
            for m in (old.input_linear, old.output_linear)
        )

    def map(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """x [batch, tokens, hidden] -> queries [batch, tokens, top_k, width], the router's logits and its choice."""
        flat = x.flatten(0, 1)
        logits, index, weights = _jetmoe_route(self.router, flat)
        queries = _each(self.input_linear, flat.repeat_interleave(index.shape[1], dim=0), index)
        return queries.view(*x.shape[:2], index.shape[1], -1), logits, (index, weights)

    def reduce(self, x: Tensor, choice: tuple[Tensor, Tensor]) -> Tensor:
        """x [batch, tokens, top_k, width] -> [batch, tokens, hidden]."""
        index, weights = choice
        outputs = _each(self.output_linear, x.flatten(0, 2), index) * weights.reshape(-1, 1)
        total: Tensor = sum(outputs.view(*index.shape, -1).unbind(1), torch.zeros_like(self.bias))
        result: Tensor = total.view(*x.shape[:2], -1) + self.bias
        return result


def _each(linears: Any, x: Tensor, index: Tensor) -> Tensor:
    """Row i of x [rows, in] through the Linear that ``index`` (of as many values) has for it -> [rows, out]."""
    out: Tensor = x.new_empty(len(x), linears[0].out_features)
    if not x.is_meta:
        for expert in sorted(set(index.reshape(-1).tolist())):
            rows = (index.reshape(-1) == expert).nonzero()[:, 0]
            out[rows] = linears[expert](x[rows])
    return out


_STAND_INS: dict[str, Callable[[Any, PretrainedConfig], nn.Module]] = {
    "llama4.modeling_llama4.Llama4TextMoe": Llama4Moe,
    "dbrx.modeling_dbrx.DbrxExperts": DbrxExperts,
    "jetmoe.modeling_jetmoe.JetMoeMoA": JetMoeAttention,
    "jetmoe.modeling_jetmoe.JetMoeMoE": JetMoe,
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": LongcatExperts,
    "step3p7.modeling_step3p7.Step3p7Experts": Step3p7Experts,
}

_ROUTERS = {
    "dbrx.modeling_dbrx.DbrxRouter": "layer",
    "jetmoe.modeling_jetmoe.JetMoeTopKGating": "layer",
    "longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": "classifier",
}
"""Routers whose matrix is a Linear, and its name."""

_REFUSED = {
    "doge.modeling_doge.DogeCDMoE": "its experts are single rows of an embedding, found by product keys",
}


def adapt(model: PreTrainedModel) -> None:
    """Put the stand-ins into ``model``; raise ``UnsupportedError`` for a family that none is possible for."""
    config = model.config.get_text_config(decoder=True)
    for name, module in list(model.named_modules()):
        kind = f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("transformers.models.")
        if kind in _REFUSED:
            raise UnsupportedError(f"model_type {model.config.model_type!r} is not supported: {_REFUSED[kind]}")
        if kind in _STAND_INS:
            model.set_submodule(name, _STAND_INS[kind](module, config))
        elif kind in _ROUTERS:
            getattr(module, _ROUTERS[kind]).__class__ = Kept


def loader_map(model: PreTrainedModel) -> list[WeightConverter]:
    """What transformers' loader lacks for the stand-ins in ``model``."""
    kinds = {type(m): m for m in model.modules() if isinstance(m, Experts)}
    return [converter for experts in kinds.values() for converter in experts.loader_map(model.config)]


def without_weights(model: PreTrainedModel) -> range:
    """Numbers of experts that have no weights; transformers writes some for them that it never reads."""
    return next((m.without_weights for m in model.modules() if isinstance(m, LongcatExperts)), range(0))
