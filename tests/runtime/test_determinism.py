"""Logits are bit-identical whatever the memory, the cache, the number of threads, and what ran before."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import flashpack
from flashpack.kernels.cpu.pool import pool
from flashpack.runtime import budget, threads
from tests import commands
from tests.conftest import ROOT, PackOf

SCRIPT = """
import sys, hashlib, torch, flashpack
pack, state, *variants = sys.argv[1:]
if state == "used":
    torch.rand(300, 300) @ torch.rand(300, 300)  # torch and its BLAS have worked before
ids = torch.randint(0, 4096, (1, 600), generator=torch.Generator().manual_seed(1))
for variant in variants:
    threads, memory = variant.split(",")
    torch.set_num_threads(int(threads))
    model = flashpack.load(pack, memory=None if memory == "default" else memory)
    if state == "warm":
        model.generate(ids[:, 300:350], max_new_tokens=5, do_sample=False)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    logits = [torch.cat(out.logits)]
    with torch.inference_mode():
        for start, tokens in ((0, 1), (7, 3), (50, 301)):
            logits.append(model(ids[:, start : start + tokens]).logits[0])
    assert torch.get_num_threads() == int(threads)
    print(hashlib.sha256(torch.cat(logits).numpy().tobytes()).hexdigest())
"""


def digests(pack: Path, state: str, *variants: str) -> list[str]:
    """One per variant ("threads,memory"), all computed in one new process."""
    command = [commands.python(), "-c", SCRIPT, str(pack), state, *variants]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def test_logits_do_not_depend_on_threads_memory_or_history(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    (first,) = digests(pack, "cold", "1,default")
    assert len(first) == 64
    for state, variants in {
        "cold": ("3,smallest", "2,default"),
        "used": ("5,default", "1,smallest"),
        "warm": ("2,700MB", "3,default"),
    }.items():
        assert digests(pack, state, *variants) == [first] * len(variants), (state, variants)


@pytest.mark.parametrize(
    ("heads", "shared", "tokens", "context", "width", "masked"),
    [
        (4, 4, 1, 600, 32, False),  # small: one piece
        (6, 2, 1, 7001, 64, True),
        (6, 2, 1, 7001, 64, False),
        (3, 3, 77, 333, 80, True),
        (8, 1, 61, 190, 64, True),
        (6, 3, 133, 133, 48, False),
    ],
)
def test_attention_has_the_same_bits_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, heads: int, shared: int, tokens: int, context: int, width: int, masked: bool
) -> None:
    g = torch.Generator().manual_seed(heads)
    query = torch.randn(1, heads, tokens, width, generator=g)
    key, value = (torch.randn(1, shared, context, width, generator=g) for _ in range(2))
    mask = torch.ones(1, 1, tokens, context, dtype=torch.bool).tril(context - tokens) if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared  # type: ignore[assignment]
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 5):
        monkeypatch.setattr(threads, "_pool", pool(count))
        torch.set_num_threads(1)  # as in a model's forward
        results.append(threads._attention(module, query, key, value, mask)[0])
    torch.set_num_threads(before)
    repeated = [t.double().repeat_interleave(heads // shared, dim=1) for t in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), *repeated, attn_mask=mask, is_causal=mask is None and tokens > 1
    )
    assert (results[0] - expected.transpose(1, 2)).abs().max() < 1e-5
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("experts", ["source", "q4", "q3"])
def test_every_arena_size_gives_the_same_bits(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, experts: str) -> None:
    # What this process holds changes between the loads, and the arenas with it: more than these budgets differ.
    divide = budget.divide
    monkeypatch.setattr(budget, "divide", lambda pack, base, *more: divide(pack, 2**28, *more))
    pack = pack_of("trained", experts)
    ids = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(2))
    results, arenas = [], set()
    smallest = flashpack.load(pack, memory="smallest").flashpack.budget.total
    for extra in (0, 3 * 2**15, 2**20, 2**22, 2**30):
        model = flashpack.load(pack, memory=smallest + extra)
        arenas.add(model.flashpack.budget.arena)
        with torch.inference_mode():
            results += [model(ids).logits.numpy() for _ in range(2)]
    assert len(arenas) == 5
    assert all(np.array_equal(results[0], r) for r in results)
