"""Every error flashpack raises: one class per cause, each with a stable code and an exit code.

A message is one line: what is wrong, where, and what to do. The command line prints it and exits with
``exit_code``; a library user catches ``FlashpackError`` or one of its children.

| exit code | meaning |
|---|---|
| 0 | done; for ``verify``: the pack is whole |
| 1 | found: ``verify``, ``push`` damage, ``selftest`` failing kernels, ``doctor`` problems, ``eval`` > ``--max-kld`` |
| 2 | the command line is wrong |
| 3 | the source checkpoint cannot be converted |
| 4 | not a pack, or a pack this version cannot read |
| 5 | damaged data met while running |
| 6 | the output cannot be written |
| 7 | the request does not fit: memory, context, device |
| 130 | interrupted |
"""

from __future__ import annotations


class FlashpackError(Exception):
    """Base of all flashpack errors."""

    code = "error"
    exit_code = 70


class UsageError(FlashpackError, ValueError):
    """An option has a value that is not understood."""

    code = "usage"
    exit_code = 2


class SourceError(FlashpackError):
    """The source checkpoint is missing, incomplete or damaged."""

    code = "source"
    exit_code = 3


class UnsupportedError(SourceError):
    """The source is sound, but flashpack does not convert this kind."""

    code = "unsupported"


class FormatError(FlashpackError):
    """The bytes are not a valid pack (or not a valid safetensors file)."""

    code = "format"
    exit_code = 4


class NotAPackError(FormatError):
    """The folder has no manifest: not a pack, or a conversion that has not finished."""

    code = "not-a-pack"


class VersionError(FormatError):
    """The pack needs a newer flashpack: format version, feature, encoding or name schema unknown."""

    code = "version"


class IntegrityError(FlashpackError):
    """Stored bytes do not match their checksum."""

    code = "integrity"
    exit_code = 5


class IdentityError(IntegrityError):
    """A sound pack, but not the one that was asked for (``--expect``)."""

    code = "identity"


class OutputError(FlashpackError, OSError):
    """The output folder is in use, not empty, or the disk is full."""

    code = "output"
    exit_code = 6


class LimitError(FlashpackError):
    """The request does not fit the machine or the model."""

    code = "limit"
    exit_code = 7


class MemoryBudgetError(LimitError, MemoryError):
    """``--memory`` is below the smallest budget this pack runs in."""

    code = "memory"


class ContextError(LimitError):
    """The prompt does not fit the context."""

    code = "context"


class DeviceError(LimitError):
    """The device does not exist here or has no kernels yet."""

    code = "device"


class CancelledError(FlashpackError):
    """The caller of a generation does not want it any more."""

    code = "cancelled"
