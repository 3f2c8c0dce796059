"""Dense tensors in place of a model's parameters and buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

import flashpack
from flashpack.formats import Pack
from flashpack.kernels import StoredMatrix, get_kernels
from flashpack.runtime.dense import PackedLinear, fill
from tests.conftest import ROOT, PackOf, extract


class Tables(PreTrainedModel):
    """A model with nothing but integers."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.register_buffer("table", torch.empty(3, 5, dtype=torch.int64))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.index = torch.nn.Parameter(torch.empty(16385, dtype=torch.int32), requires_grad=False)
        self.post_init()


def test_integers_stay_integers_whatever_the_type_of_the_model(tmp_path: Path) -> None:
    extract(ROOT / "tests/vectors/valid/integer-tensors.tar.gz", tmp_path)
    pack = Pack(tmp_path)
    with torch.device("meta"):
        model = Tables()
    fill(model, pack, [], get_kernels("cpu"), torch.bfloat16)
    for name, dtype in (("table", torch.int64), ("count", torch.int64), ("index", torch.int32)):
        found = model.state_dict()[name]
        assert found.dtype == dtype
        assert np.array_equal(found.numpy(), pack.map_tensor(name))
    assert abs(int(model.state_dict()["table"].min())) > 2**32


def test_what_neither_feeds_recurrent_states_nor_is_the_head_is_coarse(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "q4", "q4"))
    coarse: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and isinstance(module.matrix, StoredMatrix):
            coarse[module.matrix.coarse].add((["", *name.split(".")])[-2])
    assert coarse == {True: {"self_attn", "shared_expert"}, False: {"linear_attn", ""}}
