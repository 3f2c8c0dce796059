"""Devices: one folder each behind one small interface. The plain torch reference is always there, the oracle."""

from __future__ import annotations

from flashpack.errors import DeviceError
from flashpack.kernels.interface import Activation, Arena, Kernels, RecordView, StoredMatrix

__all__ = [
    "Activation",
    "Arena",
    "Kernels",
    "RecordView",
    "StoredMatrix",
    "check_device",
    "get_kernels",
]

DEVICES = ("cpu", "mps")
"""The processor; Metal."""


def check_device(device: str) -> None:
    """Raise ``DeviceError`` if ``device`` has no kernels, or is not there; compiles nothing."""
    if device not in DEVICES:
        raise DeviceError(f"device {device!r} has no kernels yet; choose from {', '.join(DEVICES)}")
    if device == "mps" and (missing := _metal_missing()):
        raise DeviceError(f"device 'mps': {missing}")


def best_device() -> str:
    """The fastest device of this machine."""
    return "cpu" if _metal_missing() else "mps"


def _metal_missing() -> str | None:
    from flashpack.kernels.metal import device

    return device.unavailable()


def first_use(device: str | None) -> str | None:
    """A line to read while ``get_kernels`` tests those of ``device``, or of the best one; None where it does not."""
    if (device or best_device()) != "mps" or _metal_missing():
        return None
    from flashpack.kernels.metal import selftest

    return None if selftest.known() else "Metal: the kernels are compared with the processor, once; this takes a while"


def get_kernels(device: str, threads: int = 1, reference: bool = False) -> Kernels:
    """The fastest kernels of ``device``, on ``threads`` threads, or the plain ones; ``DeviceError`` if it has none."""
    check_device(device)
    if device == "mps":
        from flashpack.kernels.metal import selftest

        return selftest.tested_kernels(reference)
    from flashpack.kernels.cpu.native import compute

    if reference or isinstance(compute.library(), str):
        from flashpack.kernels.cpu.reference import ReferenceKernels

        kernels = ReferenceKernels(threads)
        if not reference:
            kernels.notices.append(compute.status())
        return kernels
    from flashpack.kernels.cpu.compiled import NativeKernels

    return NativeKernels(threads)
