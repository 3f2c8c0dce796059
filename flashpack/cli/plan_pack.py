"""flashpack plan, of a pack: does it fit, and how fast will it be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashpack.cli import speeds
from flashpack.cli.console import answer_json, gb, note, say

if TYPE_CHECKING:
    from flashpack.performance.forecast import Forecast


def show(folder: Path, memory: list[str], context: int | None, trace: Path | None, json: bool) -> None:
    """Measure for some seconds, and print the forecast. Raises ``MemoryBudgetError`` if the pack does not fit here."""
    from flashpack.performance.forecast import forecast

    routing, totals = speeds.recorded(trace, folder), speeds.sizes(memory)
    note("measuring this machine with the pack, some seconds; close other programs")
    found = forecast(folder, totals, context, routing=routing)
    if json:
        answer_json({"pack": str(folder)} | found.to_json())
        return
    _print(folder, found)


def _print(folder: Path, found: Forecast) -> None:
    from flashpack.formats import Pack

    pack, b = Pack(folder), found.least
    m = pack.manifest
    say(f"{m.model['architecture']} ({m.model['model_type']}), a pack: experts {m.recipe.get('experts')}, "
        f"dense part {m.recipe.get('dense')}")  # fmt: skip
    say(f"{len(m.layers)} MoE layers, {sum(x.experts for x in m.layers):,} experts of {gb(pack.expert_bytes)} in all, "
        f"{found.top_k} of a layer for each token")  # fmt: skip
    say(
        f"memory: at least {gb(b.total)} (process {gb(b.base)}, dense part {gb(b.dense)}, KV cache of {found.context} "
        f"tokens {gb(b.kv)}, working space {gb(b.work)}, experts {gb(b.arena)}); {gb(found.most)} can be taken now; "
        f"with all experts {gb(b.total - b.arena + pack.expert_bytes)}"
    )
    speeds.say_forecast(found)
