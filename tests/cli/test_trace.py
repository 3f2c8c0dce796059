"""flashpack trace: recording, and what --simulate says of a recorded file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashpack.formats.routing import read_routing, write_routing
from flashpack.performance.policies import POLICIES, Runtime
from flashpack.performance.simulate import Requests
from tests.cli.test_cli import in_process
from tests.conftest import PackOf
from tests.performance.routings import made_up


def test_record_and_simulate(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("trained")
    file = tmp_path / f"{pack.name}.routing"
    done = in_process("trace", pack, "--tokens", 12, "-p", "Hi", "--raw", "--max-tokens", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{file.name}: ")
    assert "tokens (2 of prompts); Qwen3_5MoeForCausalLM, 6 layers, 192 experts, 4 for a token" in done.stdout
    assert done.stderr == ""
    again = in_process("trace", pack, "-p", "Hi", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (6, "")
    assert "exists already; use --overwrite" in again.stderr
    done = in_process("trace", pack, "--tokens", 12, "--overwrite", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["tokens"], answer["prompt_tokens"], answer["file"]) == (12, 0, file.name)
    assert answer["bytes"] == file.stat().st_size
    assert done.stderr == "note: recording a text of ours; --text and --prompt take your own\n"

    plain = in_process("trace", "--simulate", file, "--memory", "25%,100%", "--plot", tmp_path / "a.svg")
    assert plain.returncode == 0, plain.stderr
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert plain.stderr == f"drawn: {tmp_path}/a.svg\n"
    lines = plain.stdout.splitlines()
    assert lines[4].split() == ["experts", "in", "memory", "process", *" ".join(POLICIES).split()]
    assert lines[5].startswith(" 25.0 %     48   1.57 MB")
    assert lines[-1].endswith("simulated: equal")
    routing = read_routing(file)
    assert routing.run is not None
    rate = Requests(routing).simulate({32768: 48}, Runtime).decoded.rate
    assert lines[5].split()[-3] == f"{100 * rate:.1f}"
    found = json.loads(in_process("trace", "--simulate", file, "--memory", "25%", "--json").stdout)
    assert found["sizes"][0]["hit_rates"]["flashpack"]["decoded"] == rate
    assert found["sizes"][0]["memory_bytes"] == routing.run.beside + 48 * 32768
    assert found["run"]["run_hits"] == found["run"]["simulated_hits"] == routing.run.hits
    assert found["run"]["exact"]


def test_other_peoples_traces_are_simulated(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", experts=made_up(1, (1,) * 40).experts)
    done = in_process("trace", "--simulate", tmp_path / "a.npz", "--memory", "50%")
    assert done.returncode == 0, done.stderr
    assert "\n  40 tokens; 3 layers, 24 experts, 2 for a token in each layer\n" in done.stdout
    assert "process" not in done.stdout
    refused = in_process("trace", "--simulate", tmp_path / "a.npz", "--memory", "1GB")
    assert refused.returncode == 2
    assert "does not say how large experts are" in refused.stderr


def test_what_a_stranger_wrote_in_a_file_is_shown_harmless(tmp_path: Path) -> None:
    routing = made_up(steps=(3, 2))
    routing.about["architecture"] = "\x1b[2JMoe"
    write_routing(tmp_path / "a.routing", routing)
    done = in_process("trace", "--simulate", tmp_path / "a.routing", "--memory", "50%")
    assert "\\x1b[2JMoe" in done.stdout
    assert "hit rates of prompts in %" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which PACK shall be recorded? Or give a recorded file: --simulate FILE"),
        (("PACK", "--plot", "a.svg"), "--plot draws what --simulate finds"),
        (("PACK", "--simulate", "FILE"), "leave out PACK"),
        (("--simulate", "FILE", "--text", "t"), "leave out PACK, --text"),
        (("--simulate", "FILE", "--plot", "a.pdf"), "a.pdf: the name must end with .svg or .png"),
        (("--simulate", "FILE", "--memory", "0%"), "more than 0% and at most 100%"),
        (("--simulate", "NONE"), "No such file or directory; flashpack trace PACK makes such a file"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    write_routing(tmp_path / "FILE", made_up())
    done = in_process("trace", *arguments, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
