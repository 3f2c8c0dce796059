"""The numbers and names of SPEC.md. A test compares its tables with this file."""

from __future__ import annotations

FORMAT = "flashpack"
VERSION = 1
NAME_SCHEMA = "transformers-5"

# Names of files and folders inside a pack.
MANIFEST = "flashpack.json"
MANIFEST_DIGEST = "flashpack.json.b3"
EXPERTS_FOLDER = "experts"
JOURNAL = "flashpack.journal"
PARTIAL_SUFFIX = ".part"

# Names of tensors inside the safetensors files of a pack.
RECORDS_TENSOR = "records.{kind}"
TABLE_TENSOR = "table"
DIGESTS_TENSOR = "digests"
PAD_PREFIX = "__pad__."

PAGE = 16384
"""Data of every large file starts here, and records are multiples of it: Apple's page size, a multiple of
Linux's 4 KiB pages and of every block size that direct I/O asks for. Bytes."""

SECTION_ALIGNMENT = 64
"""Sections of a record and dense tensors start at a multiple of this (a cache line, the widest vector). Bytes."""

DIGEST_BYTES = 32

# Caps: a reader refuses larger values before it allocates anything.
MAX_HEADER_BYTES = 100_000_000
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_RECORD_BYTES = 2**32
MAX_LAYERS = 65_536
MAX_EXPERTS = 65_536
MAX_KINDS = 256

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("BF16", "F16", "F32")
RAW_DTYPES = ("BF16", "F16", "F32")

KNOWN_FEATURES: frozenset[str] = frozenset()
"""Required features this reader understands; version 1 defines none."""
