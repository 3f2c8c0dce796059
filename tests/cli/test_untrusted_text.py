"""Text of a stranger's pack on its way to a terminal: shown, never obeyed."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flashpack.cli.console import harmless, visible
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import Manifest
from flashpack.formats.writer import commit
from tests import commands
from tests.cli.test_cli import flashpack
from tests.conftest import ROOT
from tests.strangers import change_json, rewrite

PackCopy = Callable[..., Path]

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2066\u2028\ufeff\x7f"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 16 KiB … é 漢字 👍", "plain, 16 KiB … é 漢字 👍"),
        ("\x1b[31mred\r\nnext\t", "\\x1b[31mred\\r\\nnext\\t"),
        ("abc\u202egpj.exe", "abc\\u202egpj.exe"),
        ("\x9b\x7f\u2028\udc80", "\\x9b\\x7f\\u2028\\udc80"),
    ],
)
def test_what_a_terminal_obeys_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    shown.encode()


def test_generated_text_keeps_its_lines_and_its_writing_direction() -> None:
    assert harmless("a\n\tb\u200f\u202b😀") == "a\n\tb\u200f\u202b😀"
    assert harmless("\x1b[2J\r\x00\x9b\x7f") == "\\x1b[2J\\r\\x00\\x9b\\x7f"


def check(done: subprocess.CompletedProcess[str], code: int) -> str:
    """stdout and stderr of a command, in which nothing of ``EVIL`` is left."""
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert not CONTROLS.search(text), ascii(CONTROLS.findall(text))
    assert "Traceback" not in text
    return text


def test_errors_about_the_configuration(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    change_json(pack, "config.json", model_type=f"qwen{EVIL}")
    assert "qwen\\x1b]0;owned" in check(flashpack("run", pack, "-p", "x"), 4)
    change_json(pack, "config.json", model_type="qwen3_5_moe_text", layer_types=[EVIL] * 6)
    text = check(flashpack("run", pack, "-p", "x"), 4)
    assert text.count("\n") == 1


def test_errors_of_template_and_tokenizer(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "chat_template.jinja", f"{{{{ raise_exception('no {EVIL}') }}}}".encode())
    assert "\\x1b]0;owned" in check(flashpack("run", pack, "-p", "x"), 4)
    rewrite(pack, "tokenizer.json", json.dumps({"version": EVIL}).encode())
    check(flashpack("run", pack, "-p", "x", "--raw"), 4)


def manifest_with(pack: Path, part: str, **changes: str) -> None:
    data = json.loads((pack / "flashpack.json").read_text())
    data[part].update(changes)
    raw = json.dumps(data, sort_keys=True, indent=1).encode() + b"\n"
    (pack / "flashpack.json").write_bytes(raw)
    (pack / "flashpack.json.b3").write_text(f"{hexdigest(raw)}\n")


def test_inspect_and_the_manifest(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    manifest_with(pack, "recipe", experts=f"q4{EVIL}")
    assert "q4\\x1b]0;owned" in check(flashpack("inspect", pack), 0)
    check(flashpack("inspect", pack, "--json"), 0)
    manifest_with(pack, "model", architecture=f"Model{EVIL}")
    check(flashpack("inspect", pack), 4)


def test_findings_name_files_as_they_are_written_not_as_they_look(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    (pack / f"x{EVIL}.txt").write_text("")
    assert "x\\x1b]0;owned" in check(flashpack("verify", pack), 1)
    check(flashpack("run", pack, "-p", "x"), 4)
    check(flashpack("inspect", pack / f"no{EVIL}"), 4)
    if sys.platform == "darwin":
        return  # its file systems hold no such names
    (pack / f"x{EVIL}.txt").rename(pack / os.fsdecode(b"x\xff.txt"))
    assert "x\\udcff.txt" in check(flashpack("verify", pack), 1)


SCRIPT = """
import sys
import flashpack.runtime.generate as g
from flashpack.cli import main

def generate(model, tokenizer, ids, max_tokens, sampling, show, timing):
    show("hello\\x1b]0;owned\\x07\\n\\tworld")
    sys.exit()

g.generate = generate
sys.argv = ["flashpack", "run", sys.argv[1], "-p", "x", "--raw"]
main()
"""


def test_generated_text_cannot_command_a_terminal_and_reaches_a_pipe_unchanged(pack_copy: PackCopy) -> None:
    command = [commands.python(), "-c", SCRIPT, str(pack_copy("trained"))]
    piped = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert piped.stdout == b"hello\x1b]0;owned\x07\n\tworld"
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE):
        os.close(theirs)
        shown = b""
        while b"world" not in shown:
            shown += os.read(ours, 1000)
    os.close(ours)
    assert b"\x1b" not in shown
    assert b"hello\\x1b]0;owned\\x07" in shown


def quality_of(pack: Path) -> list[str]:
    """What inspect says of the quality report."""
    lines = check(flashpack("inspect", pack), 0).splitlines()
    return lines[next((i for i, line in enumerate(lines) if line.startswith("quality ")), len(lines)) :]


def test_inspect_takes_only_numbers_from_a_quality_report(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    told = quality_of(pack)
    assert re.match(r"quality    4\.5 bits per weight of the experts, [\d.]+ with padding$", told[0])
    assert [line.split()[0] for line in told[1:]] == ["8.698", "gate", "up", "down", "dense", "worst", "page:"]
    report = json.loads((pack / "quality.json").read_text())
    rows, layers = report["summary"], report["layers"]
    rows[0]["part"], rows[1]["mean"], rows[2]["max"], rows[3] = EVIL, EVIL, 10**400, [EVIL]
    layers[0]["index"], layers[1]["mean"], layers[2], layers[3]["index"] = EVIL, EVIL, EVIL, 10**400
    layers[4]["mean"] = 0.75
    change_json(pack, "quality.json", summary=rows, layers=layers, model=EVIL)
    told = quality_of(pack)
    assert told[2:4] == ["  nothing was rounded: every value is the source's own", "  worst layer 4: mean error 75 %"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "quality.json: not valid JSON"),
        (b'{"summary": NaN}', "quality.json: JSON holds NaN"),
        (json.dumps({"sizes": EVIL, "summary": [], "layers": []}).encode(), "not a report that this version reads"),
        (b"{}", "not a report that this version reads"),
        (b"", "quality.json: not valid JSON"),
        (b"\xff\xfe", "quality.json: not valid JSON"),
    ],
)
def test_inspect_of_what_is_no_quality_report(pack_copy: PackCopy, data: bytes, message: str) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "quality.json", data)
    assert message in quality_of(pack)[0]


def test_inspect_of_a_quality_report_that_is_damaged_or_missing(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    (pack / "quality.json").write_bytes(bytes((pack / "quality.json").stat().st_size))
    assert quality_of(pack)[0] == "quality    quality.json: damaged"
    manifest = Manifest.from_bytes((pack / "flashpack.json").read_bytes())
    commit(pack, replace(manifest, files=tuple(f for f in manifest.files if not f.path.startswith("quality."))))
    assert quality_of(pack) == []
