"""Examples at the end of each command's --help."""

from __future__ import annotations

_EXAMPLES = {
    "plan": ["flashpack plan ~/models/Qwen3-30B-A3B", "flashpack plan hf://Qwen/Qwen3-30B-A3B --bpw 2.8"],
    "convert": ["flashpack convert ~/models/Qwen3-30B-A3B", "flashpack convert hf://Qwen/Qwen3-30B-A3B --experts q4"],
    "verify": ["flashpack verify PACK", "flashpack verify PACK --quick"],
    "repair": ["flashpack repair PACK --from OTHER_COPY"],
    "recode": ["flashpack recode PACK OUT --codec zstd"],
    "export": ["flashpack export PACK OUT --to hf", "flashpack export PACK OUT --to mlx"],
    "inspect": ["flashpack inspect PACK", "flashpack inspect PACK --json"],
    "run": ['flashpack run PACK --prompt "Why is the sky blue?" --memory 6GB', "flashpack run PACK --prompt - < text"],
    "calibrate": ["flashpack calibrate EXACT_PACK --text own.txt"],
    "eval": ["flashpack eval PACK --against ORIGINAL --text FILE", "flashpack eval PACK --text FILE"],
    "selftest": ["flashpack selftest"],
    "doctor": ["flashpack doctor", "flashpack doctor PACK"],
}


def epilog(command: str) -> str:
    """The examples of a command, for its help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in _EXAMPLES[command])
