"""Which kernels are used here, and why not better ones."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from flashpack.doctor.machine import instruction_sets
from flashpack.doctor.remark import Remark

_NEEDS = {
    "avx512": ("avx512_vnni", "avx512vbmi", "avx512vl", "avx512bw", "avx512dq"),
    "avx2": ("avx2", "fma"),
}
"""x86: what each level needs, best first, as native/kernels.cpp asks for it."""

_NVIDIA = Path("/proc/driver/nvidia/version")

_INSTALL = "install a C++ compiler (apt install g++; on a Mac, xcode-select --install), then flashpack again"
_AGAIN = "install flashpack again: pip install --force-reinstall --no-deps --no-cache-dir ."


def compiler() -> str | None:
    """The C++ compiler that an installation would use; None if there is none."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if (path := _which(name))), None)


def _which(name: str | None) -> str | None:
    return shutil.which(name.split()[0]) if name else None


def cpu() -> Iterator[Remark]:
    """The kernels in C++ and the quantizer in C."""
    from flashpack.kernels.cpu import native
    from flashpack.kernels.cpu.native import compute

    found = compiler()
    data = {"compiler": found, "level": None}
    again = _AGAIN if found else _INSTALL
    there = f"compiler: {found}" if found else "no compiler here"
    if isinstance(compute.library(), str):
        yield Remark("note", "kernels", "run", f"{compute.status()}; {there}", again, data)
    else:
        level = compute.status().rpartition(" ")[2]
        why = _why_not_better(level)
        text = f"native, {level}{f': {why}' if why else ''}"
        data["level"] = level
        if level == "portable":
            todo = (
                "a processor with AVX2 is several times faster; a virtual machine may hide it: pass the host's model on"
            )
            yield Remark("note", "kernels", "run", text, todo, data)
        else:
            yield Remark("ok", "kernels", "run", text, data=data)
    text = native.status().removeprefix("native quantizer: ")
    if native.available():
        yield Remark("ok", "kernels", "convert", f"native quantizer, {text}")
    else:
        yield Remark("note", "kernels", "convert", f"native quantizer: {text}; {there}", again, data)


def _why_not_better(level: str) -> str:
    """What the processor lacks for the next better level; empty for the best one, and where it is not known."""
    sets = instruction_sets()
    better = list(_NEEDS)[: list(_NEEDS).index(level) if level in _NEEDS else len(_NEEDS)]
    if platform.machine() not in ("x86_64", "AMD64") or not better or not sets:
        return ""
    lacking = [name for name in _NEEDS[better[-1]] if name not in sets]
    return f"{better[-1]} needs {', '.join(lacking)}, which the processor does not have or show" if lacking else ""


def gpu() -> Iterator[Remark]:
    """Metal and CUDA."""
    if sys.platform == "darwin":
        yield _metal()
    yield _cuda()


def _metal() -> Remark:
    from flashpack.kernels.metal import device, selftest

    if missing := device.unavailable():
        return Remark("note", "kernels", "Metal", f"not used: {missing}", "the processor is used; update what it names")
    kept = selftest.answer()
    if kept is None:
        text = "there; its kernels have not been tested here"
        return Remark(
            "note", "kernels", "Metal", text, "flashpack selftest; else the first run does it, and takes longer"
        )
    if kept:
        text = f"there; {len(kept)} findings of its self-test: {'; '.join(kept[:3])}"
        return Remark("note", "kernels", "Metal", text, "flashpack selftest says more; torch computes in their place")
    return Remark("ok", "kernels", "Metal", "there, and all its kernels have passed their test here")


def _cuda() -> Remark:
    import torch

    from flashpack.kernels.cuda import quantize

    missing = quantize.missing()
    use = "`run` has no CUDA kernels yet and uses the processor"
    if missing is None:
        name = torch.cuda.get_device_name()
        text = f"{name}: `convert` quantizes on it; {use}"
        return Remark("ok", "kernels", "CUDA", text, data={"device": name})
    if torch.cuda.is_available() or _NVIDIA.exists():
        built = torch.version.cuda
        text = f"an NVIDIA GPU is here, and this torch ({torch.__version__}) cannot use it: {missing}"
        todo = "update the driver" if built else "install a build of torch with CUDA"
        return Remark("note", "kernels", "CUDA", text, f"{todo}: `convert` would quantize on it; {use}")
    return Remark("ok", "kernels", "CUDA", "no NVIDIA GPU")
