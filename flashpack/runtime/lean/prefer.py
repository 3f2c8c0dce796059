"""Cache-aware routing: experts that are in memory take the place of chosen ones that would have to be read.

It changes the output, and makes it depend on what was computed before; only for those who ask for it.
"""

from __future__ import annotations

import torch

from flashpack.runtime.lean.blocks import Experts


class Preference:
    """After the router of ``block``: a chosen expert that is not in memory gives its place to the best one that is and
    was not chosen, if the router gives that one at least ``ratio`` times as much weight (0 < ratio < 1).

    The lightest give way first, and as many experts as before are used, with the weights that the router would have
    given them. So what a token leans on is read, and what it hardly distinguishes is not.
    """

    def __init__(self, block: Experts, ratio: float) -> None:
        self._router, self._holds, self._ratio = block.router, block.holds, ratio

    def __call__(self) -> None:
        router, ratio = self._router, self._ratio
        chosen = router.read()
        absent = [e for e in chosen if not self._holds(e)]
        if not absent:
            return
        shares, scores = router.shares()
        least = ratio * min(shares[e] for e in absent)
        here = [e for e, share in enumerate(shares) if share >= least and e not in chosen and self._holds(e)]
        here.sort(key=scores.__getitem__)
        before = list(chosen)
        for e in sorted(absent, key=scores.__getitem__):
            if here and shares[here[-1]] >= ratio * shares[e]:
                chosen[chosen.index(e)] = here.pop()
        if chosen != before:
            router.chosen.copy_(torch.tensor(chosen, dtype=torch.int32))
            router.weigh(shares)
