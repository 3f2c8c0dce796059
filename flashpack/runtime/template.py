"""Chat templates are programs of strangers: they run in a process of their own, with little time and memory.

transformers renders them in jinja2's sandbox, which keeps them from Python's internals and the system, but a
template may loop for ever or build a text of many gigabytes in one step that nothing in the same process could stop.
So one child process renders for this process, for as long as it lives. It takes limits from the system: seconds of
processor time per template (whatever else the machine does), memory (not on macOS, which has no such limit), and
neither writes files nor starts processes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import IO, Any

from flashpack.errors import FormatError

SECONDS = 5
"""Processor time for one template. Real ones need milliseconds."""

MEMORY = 2**30
"""Bytes the child may take beside what its libraries take."""

TEXT = 2**16
TEXT_FACTOR = 16
"""A rendered text may have ``TEXT`` characters, or be ``TEXT_FACTOR`` times as long as template and messages."""

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


def start() -> None:
    """Start the child, which takes a second to be ready; ``render`` does it if nobody did."""
    with _lock:
        _start()


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The text of ``messages`` in ``template``, as ``apply_chat_template`` renders it; the beginning of an answer
    follows unless ``variables`` have ``add_generation_prompt=False``.

    Raises ``FormatError`` if the template fails or takes too long, too much memory, or makes too long a text.
    """
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    data = {"template": template, "messages": messages, "variables": variables}
    request = json.dumps(data, default=str).encode() + b"\n"
    with _lock:
        child = _start()
        stdin, stdout = _pipes(child)
        with contextlib.suppress(BrokenPipeError):
            stdin.write(request)
            stdin.flush()
        line = stdout.readline()
        if not line.endswith(b"\n"):
            code = child.wait()
            _stop()
            if code > 0:
                raise FormatError(
                    "the chat template cannot be rendered; 'python -m flashpack.runtime.template' shows why"
                )
            raise FormatError(
                f"the pack's chat template takes more than {SECONDS} s or {MEMORY // 2**20} MiB; use --raw without it"
            )
    answer = json.loads(line)
    if "error" in answer:
        raise FormatError(f"the pack's chat template fails: {answer['error']}; use --raw without it")
    return str(answer["text"])


def _start() -> subprocess.Popen[bytes]:
    global _child
    if _child is None:
        # -P and no relative paths: nothing may be imported from the current folder, which may be the pack.
        path = os.pathsep.join(p for p in sys.path if os.path.isabs(p))
        _child = subprocess.Popen(
            [sys.executable, "-P", "-m", "flashpack.runtime.template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "critical"},
            start_new_session=True,  # Ctrl-C is for this process
        )
    return _child


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert child.stdin is not None
    assert child.stdout is not None
    return child.stdin, child.stdout


@atexit.register
def _stop() -> None:
    global _child
    if _child is not None:
        _child.kill()
        for pipe in _pipes(_child):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        _child.wait()
        _child = None


def _serve() -> None:
    """The child: requests on stdin, answers on stdout, one line of JSON each."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(request: dict[str, Any]) -> dict[str, str]:
        template = request["template"]
        most = max(TEXT, TEXT_FACTOR * len(json.dumps(request)))
        rendered: Any = render_jinja_template(
            [request["messages"]], chat_template=template, **{"add_generation_prompt": True} | request["variables"]
        )
        text = rendered[0][0]
        if len(text) > most:
            raise ValueError(f"its text of {len(text)} characters is too long")
        return {"text": text}

    _forgo()
    for line in sys.stdin.buffer:
        _allow(SECONDS)
        try:
            reply = answer(json.loads(line))
        except Exception as e:
            reply = {"error": f"{type(e).__name__}: {e}".split("\n")[0][:300]}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _forgo() -> None:
    """Give up what a template never needs, for the case that one breaks out of the sandbox."""
    import resource

    if sys.platform == "linux":
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    for kind in ("FSIZE", "NPROC", "CORE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (0, 0))


def _allow(seconds: int) -> None:
    """End this process when it has used ``seconds`` more of processor time."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, most))


if __name__ == "__main__":
    _serve()
