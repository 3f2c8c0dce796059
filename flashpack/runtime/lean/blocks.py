"""Feed-forward blocks as steps of the kernels: routers, routed experts, networks that every token uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashpack.kernels.activations import recognize
from flashpack.kernels.interface import MODES, RecordView, Step
from flashpack.runtime.dense import PackedLinear, as_stored
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.lean.board import PROBES, Board, NotLean, norm_of, products
from flashpack.runtime.store import ExpertStore


class Router:
    """A linear layer whose largest logits choose experts: int32 ``chosen`` and ``weights`` of ``top_k``.

    ``all_weights`` has room for one more behind ``weights``.
    """

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        weight = as_stored(module, "weight")
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != len(board.x):
            raise NotLean(f"router {type(module).__name__} has no weight [experts, hidden]")
        weight = weight.detach()
        bias = getattr(part, "bias", None)
        correction = getattr(part, "e_score_correction_bias", None)
        probe = torch.randn(PROBES, len(board.x), generator=torch.Generator().manual_seed(1)).to(board.x.device)
        index, found = _routing(module, probe)
        top_k = index.shape[1]
        self._board, self._weight, self._bias, self._correction = board, weight, bias, correction
        self._values = logits = board.array("router", len(weight))
        self.chosen = torch.zeros(top_k, dtype=torch.int32, device=board.x.device)
        self.all_weights = torch.ones(top_k + 1, device=board.x.device)
        self.weights = self.all_weights[:top_k]
        product = board.steps.products(board.normed, [weight], [bias], [logits])
        if product is None:
            raise NotLean(f"router {type(module).__name__} is stored in a way the kernels do not know")
        for mode in MODES:
            for divide in (False, True):
                for factor in {1.0, float(getattr(part, "routed_scaling_factor", 1.0))}:
                    route = board.steps.route(
                        logits, correction, top_k, mode, divide, factor, self.chosen, self.weights
                    )
                    self.steps = [product, route]
                    if all(self._agrees(board, p, i, w) for p, i, w in zip(probe, index, found, strict=True)):
                        self._kind = mode, divide, factor
                        return
        raise NotLean(f"router {type(module).__name__} chooses experts in another way")

    def _agrees(self, board: Board, probe: Tensor, index: Tensor, weights: Tensor) -> bool:
        board.normed.copy_(probe)
        for step in self.steps:
            step()
        mine, theirs = self.chosen.long().argsort(), index.argsort()
        return torch.equal(self.chosen.long()[mine], index[theirs]) and torch.allclose(
            self.weights[mine], weights.float()[theirs], rtol=1e-3, atol=1e-6
        )

    def read(self) -> list[int]:
        """The experts chosen."""
        return self._board.steps.read(self.chosen)

    def shares(self) -> tuple[list[float], list[float]]:
        """Of every expert: the weight before those of the chosen are divided by their sum, and what it is chosen by."""
        if self._kind[0] != "sigmoid-top":
            shares = self._values.softmax(0).tolist()
            return shares, shares
        values = self._values.sigmoid()
        return values.tolist(), (values if self._correction is None else values + self._correction).tolist()

    def weigh(self, shares: list[float]) -> None:
        """Set ``weights`` for ``chosen`` as the router would if these were the largest."""
        mode, divide, factor = self._kind
        found = torch.tensor([shares[e] for e in self.read()])
        self.weights.copy_((found / (found.sum() + 1e-20) if divide or mode == "top-softmax" else found) * factor)

    def on(self, x: Tensor) -> Callable[[], list[int]]:
        """The same choice from ``x`` [hidden], as a list that begins with the largest logit, in arrays of its own."""
        steps, experts = self._board.steps, len(self._weight)
        logits, chosen = self._board.array("guessed logits", experts), torch.zeros_like(self.chosen)
        product = steps.products(x, [self._weight], [self._bias], [logits])
        assert product is not None  # as for this router
        route = steps.route(
            logits, self._correction, len(chosen), *self._kind, chosen, torch.zeros_like(self.weights)
        )  # fmt: skip

        def choose() -> list[int]:
            product()
            route()
            return steps.read(chosen)

        return choose


def _routing(module: nn.Module, probe: Tensor) -> tuple[Tensor, Tensor]:
    """What a router answers: indices and weights [tokens, top_k]."""
    try:
        answer = module(probe)
    except Exception as e:
        raise NotLean(f"router {type(module).__name__} cannot be asked alone: {e}") from e
    parts = [t for t in answer if isinstance(t, Tensor)] if isinstance(answer, tuple) else []
    indices = [t for t in parts if t.dtype == torch.int64 and t.ndim == 2]
    weights = [t for t in parts if t.is_floating_point() and len(indices) == 1 and t.shape == indices[0].shape]
    if not weights:
        raise NotLean(f"router {type(module).__name__} answers something else than indices and weights")
    return indices[0], weights[-1]


class Network:
    """A gated feed-forward network for every token, computed like an expert; as a block it answers with ``y``."""

    steps: Sequence[Step] = ()

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        names = ("gate_proj", "up_proj", "down_proj")
        parts = [getattr(part, name, None) for name in names]
        gate, up, down = (p if isinstance(p, PackedLinear) else None for p in parts)
        if {name for name, _ in part.named_children()} - {*names, "act_fn"} or not (gate and up and down):
            raise NotLean(f"{type(module).__name__} has other parts than {', '.join(names)}")
        hidden, inner = len(board.x), gate.out_features
        if [p.matrix.shape for p in (gate, up, down)] != [(inner, hidden), (inner, hidden), (hidden, inner)]:
            raise NotLean(f"{type(module).__name__} has matrices that do not fit each other")
        record = board.steps.record(RecordView((gate.matrix, up.matrix), down.matrix, (gate.bias, up.bias), down.bias))
        function = part.act_fn
        self.activation = recognize(lambda x: function(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :], gated=True)
        if record is None or self.activation.name is None:
            raise NotLean(f"{type(module).__name__} is stored or activated in a way the kernels do not know")
        self.record = record
        self._compute = board.steps.experts(board.normed, self.activation, board.y.view(1, -1))
        probe = torch.randn(2, hidden, generator=torch.Generator().manual_seed(2)).to(board.x.device)
        for x, expected in zip(probe, module(probe), strict=True):
            board.normed.copy_(x)
            self._compute([self.record], 0)
            if not torch.allclose(board.y, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                raise NotLean(f"{type(module).__name__} computes something else than a gated network")

    def __call__(self) -> None:
        self._compute([self.record], 0)


class Guess:
    """Which experts the next layer will ask for: its router's answer to the stream, without what experts add before."""

    def __init__(self, board: Board, norm: nn.Module, experts: Experts) -> None:
        hidden = len(board.x)
        self.layer = experts.layer
        normed = board.array("guess", hidden)
        self._norm = board.steps.add_norm(board.x, None, *norm_of(norm, hidden), normed)
        self._router = experts.router.on(normed)

    def __call__(self) -> list[int]:
        """Experts, likeliest first."""
        self._norm()
        return self._router()


class Experts:
    """A router and routed experts, and perhaps a network beside them that every token uses: one more expert, whose
    weight is 1 or what a switch says, the sigmoid of a linear layer's only value.

    ``steps`` come before it is called. ``routed`` computes ``y`` when the router has chosen; a match replaces it for a
    moment. ``combine``: ``outputs`` to ``y``; row 0 is that of the network beside, if there is one, whose place is the
    last.
    ``guess``: of a later layer, whose experts may be read while this one's are computed. ``prefer``: changes what the
    router has chosen (``Preference``).
    """

    guess: Guess | None = None
    prefer: Step | None = None

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        children = [m for _, m in part.named_children()]
        experts = [m.flashpack for m in children if isinstance(getattr(m, "flashpack", None), RoutedExperts)]
        networks = [m for m in children if hasattr(m, "down_proj") and not hasattr(m, "flashpack")]
        switches = [m for m in children if isinstance(m, PackedLinear) and m.out_features == 1]
        routers = [m for m in children if not hasattr(m, "flashpack") and m not in (*networks, *switches)]
        if len(experts) != 1 or len(routers) != 1 or not len(switches) <= len(networks) <= 1:
            raise NotLean(f"{type(module).__name__} is more than a router, experts and a network with a switch")
        self._experts: RoutedExperts = experts[0]
        self.layer = self._experts.layer
        if self._experts.activation.name is None or self._experts.has_norm:
            raise NotLean(f"{type(module).__name__} has an activation the kernels do not know")
        networks = [Network(board, m) for m in networks]
        if any(n.activation.name != self._experts.activation.name for n in networks):
            raise NotLean(f"{type(module).__name__} has activations of two kinds")
        self.experts_count = self._experts.num_experts
        self.router = Router(board, routers[0])
        self.steps = self.router.steps
        self.beside = [n.record for n in networks]
        top_k = len(self.router.chosen)
        rows = top_k + len(self.beside)
        self.weights = weights = self.router.all_weights[:rows]
        self.outputs = board.array("outputs", rows * len(board.x)).view(rows, -1)
        self.places = torch.zeros(rows, dtype=torch.int32, device=board.x.device)
        self.switch: list[Step] = []
        if switches:
            logit, only = board.array("switch", 1), board.array("only", 1, torch.int32)
            self.switch = [
                products(board, board.normed, switches, [logit]),
                board.steps.route(logit, None, 1, "sigmoid-top", False, 1.0, only, weights[top_k:]),
            ]
        self.activation = self._experts.activation
        self.compute = board.steps.experts(board.normed, self.activation, self.outputs)
        combine = board.steps.combine(self.outputs, self.places, weights, board.y)
        self._weigh = board.steps.sequence(self.switch)
        self.combine = board.steps.sequence([*self.switch, combine])
        self.at_once = board.steps.experts_combined(board.normed, self.activation, weights, board.y)
        self._write = board.steps.write
        self.routed: Step = self._routed

    @property
    def store(self) -> ExpertStore:
        """Where the experts come from; all layers have the same."""
        return self._experts.store

    @property
    def prefetches(self) -> bool:
        """Whether the store reads ahead at all."""
        return self._experts.store.prefetches

    def holds(self, expert: int) -> bool:
        """Whether an expert is in memory, or on its way."""
        return self._experts.store.holds(self.layer, expert)

    def __call__(self) -> None:
        if self.prefer is not None:
            self.prefer()
        self.routed()

    def _routed(self) -> None:
        chosen = self.router.read()
        row: dict[int, int] = {}
        records, end = list(self.beside), 0  # computed with the first batch: while others are being read
        store = self._experts.store
        whole = False
        for batch in store.batches(self.layer, sorted(chosen)):
            if not end and self.guess is not None and store.guessing:  # after this layer's own reads have begun
                store.prefetch(self.guess.layer, self.guess())
            if self.at_once and len(batch) == len(chosen):
                found, whole = dict(batch), True
                self._weigh()
                self.at_once([*(found[e] for e in chosen), *records])
                continue
            records += [record for _, record in batch]
            self.compute(records, end)
            end += len(records)
            row.update((expert, end - len(batch) + i) for i, (expert, _) in enumerate(batch))
            records = []
        if not whole:
            self._write(self.places, [row[e] for e in chosen])
            self.combine()


class PlainBlock:
    """The library's own feed-forward block on ``normed``."""

    steps: Sequence[Step] = ()

    def __init__(self, board: Board, module: nn.Module) -> None:
        self._board, self._module = board, module

    def __call__(self) -> None:
        out = self._module(self._board.normed.view(1, 1, -1))
        if not isinstance(out, Tensor):
            raise NotLean(f"{type(self._module).__name__} answers more than a tensor")
        self._board.y.copy_(out.view(-1))
