"""Logits are bit-identical whatever the memory, the cache, the number of threads, and what ran before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flashpack
from tests.conftest import ROOT, PackOf

SCRIPT = """
import sys, hashlib, torch, flashpack
torch.set_num_threads(int(sys.argv[2]))
model = flashpack.load(sys.argv[1], memory=None if sys.argv[3] == "default" else sys.argv[3])
ids = torch.randint(0, 4096, (1, 600), generator=torch.Generator().manual_seed(1))
if sys.argv[4] == "warm":
    model.generate(ids[:, 300:350], max_new_tokens=5, do_sample=False)
out = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
print(hashlib.sha256(torch.cat(out.logits).numpy().tobytes()).hexdigest())
"""


def digest(pack: Path, threads: int, memory: str, state: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(pack), str(threads), memory, state]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_logits_do_not_depend_on_threads_memory_or_history(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    first = digest(pack, 1, "default", "cold")
    assert len(first) == 64
    for variant in [(2, "default", "cold"), (3, "smallest", "cold"), (1, "smallest", "warm"), (2, "700MB", "warm")]:
        assert digest(pack, *variant) == first, variant


@pytest.mark.parametrize("experts", ["source", "q4", "q3"])
def test_every_arena_size_gives_the_same_bits(pack_of: PackOf, experts: str) -> None:
    pack = pack_of("trained", experts)
    ids = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(2))
    results, arenas = [], set()
    for extra in (0, 3 * 2**15, 2**20, 2**22, 2**30):
        smallest = flashpack.load(pack, memory="smallest").flashpack.budget.total
        model = flashpack.load(pack, memory=smallest + 2**22 + extra)
        arenas.add(model.flashpack.budget.arena)
        with torch.inference_mode():
            results += [model(ids).logits.numpy() for _ in range(2)]
    assert len(arenas) >= 3
    assert all(np.array_equal(results[0], r) for r in results)
