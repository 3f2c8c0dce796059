"""The table of families in docs/families.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

DOCUMENT = "docs/families.md"

_HEAD = """# Families

Made by `python tools/families.py` with transformers {version}. Each family whose experts modules have transformers'
experts hook (`use_experts_implementation`) is tried with a tiny seeded checkpoint under released names: converted with
`--experts source --dense source`, loaded with the smallest memory budget, and compared with transformers' own model in
float32 with eager attention and experts: logits of a prompt of 20 tokens, and of 4 more that are decoded greedily with
the cache. Every value of the checkpoint is in the pack once, or its tensor is listed in the conversion's report.
`tests/families` does the same at every run.

Parts for images, sound and multi-token prediction are left out. Families without the hook have stand-ins in
`flashpack/adapters.py`, or are read as a family that computes the same; `tests/families/test_adapters.py` tries them
the same way, with 24 tokens (here the largest difference seen, also with prompts of 700):

| family without the hook | max logit difference |
|---|---|
| llama4 (text; also below vision) | 1e-05 |
| dbrx | 1e-05 |
| longcat_flash | 8e-06 |
| step3p7 | 2e-05 |
| jetmoe (the experts of its attention stay in memory) | 2e-05 |
| kimi_k2, kimi_k25, kimi_vl (read as deepseek_v3) | 5e-06 |

Refused by name: doge, nllb_moe, switch_transformers, step3p5.

Families with the hook:

| family | converts | runs | max logit difference | remark |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A family's row; ``difference`` None: refused, as ``remark`` says."""

    family: str
    difference: float | None
    remark: str = ""


def table(rows: list[Row], version: str) -> str:
    """The whole document."""
    lines = [
        f"| {r.family} | no | no | | {r.remark} |"
        if r.difference is None
        else f"| {r.family} | yes | yes | {f'{r.difference:.0e}' if r.difference else 0} | {r.remark} |"
        for r in sorted(rows, key=lambda r: r.family)
    ]
    return _HEAD.format(version=version) + "\n".join(lines) + "\n"


def families_in(document: str) -> list[str]:
    """The first cells of the table."""
    return re.findall(r"^\| (\w+) \| (?:yes|no) \|", document, re.MULTILINE)
