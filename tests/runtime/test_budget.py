"""Memory: sizes, division of a budget, and that a process keeps to it."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import pytest

import flashpack
from flashpack.errors import MemoryBudgetError, UsageError
from flashpack.formats import Pack
from flashpack.runtime.budget import divide
from flashpack.runtime.memory import available, parse_size, usage
from tests.conftest import ROOT, PackOf


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("2 GiB", 2**31), ("1.5mb", 1_500_000), (123, 123), ("7", 7)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 XB", "1e9", "two"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_the_arena_gets_what_is_left_and_never_more_than_all_experts(pack_of: PackOf) -> None:
    pack = Pack(pack_of("trained"))
    smallest = divide(pack, 10**8, 10**6, 10**7, "smallest", 0)
    assert smallest.slots == {32768: 2}
    assert smallest.total == 10**8 + 10**6 + 10**7 + pack.dense_bytes + 2 * 32768
    more = divide(pack, 10**8, 10**6, 10**7, smallest.total + 10 * 32768, 0)
    assert more.slots == {32768: 12}
    assert divide(pack, 10**8, 10**6, 10**7, 10**12, 0).arena == pack.expert_bytes
    assert divide(pack, 10**8, 10**6, 10**7, None, 10**9).arena == pack.expert_bytes
    with pytest.raises(MemoryBudgetError, match=f"at least {smallest.total / 1e9:.2f} GB"):
        divide(pack, 10**8, 10**6, 10**7, smallest.total - 1, 0)
    with pytest.raises(MemoryBudgetError, match="not enough memory"):
        divide(pack, 10**8, 10**6, 10**7, None, 1000)


def test_the_kv_cache_is_counted_by_the_context(pack_of: PackOf) -> None:
    one, two = (flashpack.load(pack_of("trained"), memory="smallest", context=c).flashpack.budget for c in (1024, 2048))
    # 2 full-attention layers, 2 KV heads of 64, keys and values, float32.
    assert two.kv - one.kv == 1024 * 2 * 2 * 2 * 64 * 4


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_the_state_of_recurrent_layers_is_counted(pack_of: PackOf, name: str) -> None:
    budget = flashpack.load(pack_of(name), memory="smallest", context=1).flashpack.budget
    # 3 layers: 4 inputs of 128 channels and 4 states of 16 x 16; 1 layer of 2 KV heads of 32; float32.
    assert budget.kv == 4 * (3 * (4 * 128 + 4 * 16 * 16) + 2 * 2 * 32)


def test_figures_of_this_process_make_sense() -> None:
    before = usage()
    block = mmap.mmap(-1, 64 * 2**20)  # never memory that was freed before
    block.write(bytes(len(block)))
    assert usage().anonymous - before.anonymous > 60 * 2**20
    assert available() > len(block)


PEAK = """
import json, sys, torch, flashpack
from flashpack.runtime.memory import usage
model = flashpack.load(sys.argv[1], memory="smallest")
ids = torch.randint(0, 4096, (1, 2000), generator=torch.Generator().manual_seed(1))
model.generate(ids, max_new_tokens=8, do_sample=False)
import re
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
print(json.dumps({"peak": peak, "file": usage().file, "total": model.flashpack.budget.total}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_prompt_in_the_smallest_memory_stays_within_it(pack_of: PackOf) -> None:
    """Peak resident memory minus mapped files (mostly libraries) stays below what the budget says."""
    command = [sys.executable, "-c", PEAK, str(pack_of("trained"))]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert found["peak"] - found["file"] <= found["total"]
