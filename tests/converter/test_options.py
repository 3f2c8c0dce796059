"""What a conversion may be asked for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashpack.converter.options import Options, by_projection
from flashpack.errors import UsageError


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("q4", "q4"),
        ("gate_up=2,down=4", "gate_up=q2,down=q4"),
        ("down=dq3, gate_up=dq2", "gate_up=dq2,down=dq3"),
        ("gate_up=q8,down=dq4", "gate_up=q8,down=dq4"),
    ],
)
def test_a_choice_of_experts_is_written_in_one_way(given: str, normal: str) -> None:
    assert Options(given).experts == normal
    assert Options(normal).experts == normal


def test_gate_and_up_are_chosen_together() -> None:
    assert by_projection("gate_up=q2,down=dq3") == {"gate": "q2", "up": "q2", "down": "dq3"}
    assert by_projection("source") == {"gate": "source", "up": "source", "down": "source"}


@pytest.mark.parametrize(
    "experts",
    ["q7", "gate_up=2", "down=2", "gate_up=7,down=2", "gate_up=source,down=q2", "gate=2,up=2,down=2", "=", ""],
)
def test_other_choices_of_experts_are_refused(experts: str) -> None:
    with pytest.raises(UsageError, match="--experts"):
        Options(experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "best"}, "--quality best: choose from fast, default, high, max"),
        ({"quality": "high"}, "--quality high needs --calib FILE"),
        ({"calib": "x.calib"}, "--quality default does not use it; choose high or max"),
        ({"bpw": "2.8", "experts": "q4"}, "leave out --experts"),
        ({"bpw": "three"}, "--bpw three: not a number"),
        ({"bpw": "-3"}, "--bpw -3: not a number"),
        ({"bpw": "nan"}, "--bpw nan: not a number"),
        ({"bpw": "0"}, "--bpw 0: not a number"),
        ({"dense": "dq4"}, "--dense dq4: choose from"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**options)  # type: ignore[arg-type]


def test_a_calibration_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    from flashpack.converter import plan
    from flashpack.errors import SourceError
    from tests.conftest import CHECKPOINTS

    with pytest.raises(SourceError, match=r"none\.calib: No such file"):
        plan(CHECKPOINTS / "qwen3_moe", Options(quality="max", calib=str(tmp_path / "none.calib")))
