"""Make the bench checkpoint: Qwen3-30B-A3B's layer dimensions, any number of layers, random bfloat16 weights.

    python bench/make_checkpoint.py OUT --layers 12

    # One layer with the experts of Qwen3.5-397B, as MLX stores them at 4 bits: 3.6 GB
    python bench/make_checkpoint.py OUT --layers 1 --experts 512 --hidden 4096 --width 1024 --vocab 4096 --mlx

Names, shapes and config.json are those of a published Qwen3-MoE checkpoint, so any tool can convert it. Memory stays
under 300 MB: tensors are written one by one, values drawn from a pool of random numbers at a random start.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 2 * 10**9
POOL = 2**25

PACKED = " (4 bit)"
GROUP = 64
"""Values per scale of ``--mlx``, at 4 bits."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes by tensor name. Names that end in ``PACKED`` stand for 4-bit words of MLX (uint32), others for bfloat16."""


def config_of(args: argparse.Namespace) -> dict[str, object]:
    """config.json as Qwen publishes it, or as mlx-lm writes it."""
    quantization = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    return ({"quantization": quantization, "quantization_config": quantization} if args.mlx else {}) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": args.width,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": args.experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": args.vocab,
    }


def shapes_of(args: argparse.Namespace) -> Shapes:
    """Every tensor's name and shape, in checkpoint order."""
    h, w = args.hidden, args.width
    shapes: Shapes = {"model.embed_tokens.weight": (args.vocab, h)}
    for i in range(args.layers):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (4096, h)), ("k", (512, h)), ("v", (512, h)), ("o", (h, 4096))):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
        for name in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (128,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (h,)
        shapes[f"{layer}.mlp.gate.weight"] = (args.experts, h)
        matrices = {"gate": (w, h), "up": (w, h), "down": (h, w)}
        if args.mlx:
            for name, (rows, width) in matrices.items():
                stack = f"{layer}.mlp.switch_mlp.{name}_proj"
                shapes[f"{stack}.weight{PACKED}"] = (args.experts, rows, width // 8)
                for part in ("scales", "biases"):
                    shapes[f"{stack}.{part}"] = (args.experts, rows, width // GROUP)
            continue
        for e in range(args.experts):
            for name, shape in matrices.items():
                shapes[f"{layer}.mlp.experts.{e}.{name}_proj.weight"] = shape
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (args.vocab, h)}


def shards_of(shapes: Shapes) -> Iterator[Shapes]:
    """Cut the tensors into files of about 2 GB."""
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        shard[name] = shape
        size += nbytes(name, shape)
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def nbytes(name: str, shape: tuple[int, ...]) -> int:
    """Stored size of a tensor."""
    return (4 if name.endswith(PACKED) else 2) * math.prod(shape)


def values(name: str, shape: tuple[int, ...], pool: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Values of a tensor, 16 bits at a time, in pieces: norms are 1, the rest from the pool (deviation 0.02).

    Embeddings have deviation 10, so that they outweigh what the layers add, and every layer routes tokens differently.
    """
    count = nbytes(name, shape) // 2
    if "norm" in name:
        yield np.full(count, 0x3F80, dtype=np.uint16)
        return
    while count:
        start = int(rng.integers(0, len(pool) // 2))
        piece = pool[start : start + min(count, len(pool) // 2)]
        yield piece + np.uint16(9 << 7) if "embed_tokens" in name else piece  # exponent + 9: times 512
        count -= len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768, help="rows of an expert's gate and up")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--mlx", action="store_true", help="experts at 4 bits, as mlx-lm stores them")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    begun = time.monotonic()
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    pool = (noise.view(np.uint32) >> 16).astype(np.uint16)
    shapes = shapes_of(args)
    shards = list(shards_of(shapes))
    weight_map: dict[str, str] = {}
    total = sum(nbytes(*item) for item in shapes.items())
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for i, shard in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys((tensor.removesuffix(PACKED) for tensor in shard), name)
            header: dict[str, object] = {}
            offset = 0
            for tensor, shape in shard.items():
                end = offset + nbytes(tensor, shape)
                dtype = "U32" if tensor.endswith(PACKED) else "BF16"
                header[tensor.removesuffix(PACKED)] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(args.out / name, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                for tensor, shape in shard.items():
                    for piece in values(tensor, shape, pool, rng):
                        f.write(piece.tobytes())
                        bar.update(piece.nbytes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.out / "config.json").write_text(json.dumps(config_of(args), indent=1))
    # A small real tokenizer, so that text goes in and out; its ids are within the vocabulary.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-qwen3.5-moe" / name, args.out)
    print(f"{args.out}: {total / 1e9:.2f} GB in {len(shards)} shards, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
