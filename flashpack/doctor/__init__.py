"""What this machine has, which kernels run on it, how fast its disk is, whether a pack is whole: remarks, each with a
next step where there is one. Nothing is changed; ``disk`` writes a file for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashpack.errors import FlashpackError

if TYPE_CHECKING:
    from flashpack.doctor.remark import Remark

_REPORT = "report it, with this output and that of `flashpack --version`"


def examine(
    pack: Path | None = None, disk: Path | None = None, begin: Callable[[str], object] = lambda what: None
) -> list[Remark]:
    """All remarks about this machine, and about ``pack`` and the disk it is on.

    ``disk``: a folder in which a temporary file is measured. ``begin`` is called with what is looked at next.
    A pack that is not there or damaged is a remark, as is a check that fails.
    """
    from flashpack.doctor import disk as drive
    from flashpack.doctor import kernels, machine, packs

    folder = drive.existing(disk or pack or Path())
    found: list[Remark] = []

    def look(area: str, what: str, check: Callable[[], Iterable[Remark]]) -> None:
        begin(what)
        found.extend(_guarded(area, what, check))

    look("machine", "the machine", machine.system)
    look("machine", "Python and its packages", machine.software)
    look("machine", "the processor", machine.processor)
    look("machine", "the memory", machine.memory)
    look("machine", "the limits and settings", machine.settings)
    look("kernels", "the processor's kernels", kernels.cpu)
    look("kernels", "the GPU", kernels.gpu)
    look("disk", "the disk", lambda: drive.place(folder))
    if disk is not None:
        look("disk", "the disk's speed", lambda: drive.temporary(disk, begin))
    if pack is not None:
        whole = packs.Whole(pack)
        look("pack", "the pack's structure", whole.check)
        if whole.opened is not None:
            look("disk", drive.READING, whole.speed)
            look("pack", "what the pack needs", whole.needs)
    look("pack", "unfinished conversions", lambda: packs.unfinished(pack))
    return found


def _guarded(area: str, what: str, check: Callable[[], Iterable[Remark]]) -> list[Remark]:
    """The remarks of one check, whatever happens in it: the others have something to say, too."""
    from flashpack.doctor.remark import Remark

    found: list[Remark] = []
    try:
        found.extend(check())
    except (FlashpackError, OSError) as e:
        found.append(Remark("problem", area, what, f"cannot be examined: {e}", "mend this first, then look again"))
    except ImportError as e:
        found.append(
            Remark("problem", area, what, f"cannot be examined: {e}", "install flashpack-moe again, with what it needs")
        )
    except Exception as e:  # a doctor does not faint
        found.append(Remark("problem", area, what, f"the check failed: {type(e).__name__}: {e}", _REPORT))
    return found
