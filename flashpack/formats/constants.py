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
ALLOCATION = "allocation.json"
QUALITY = "quality.json"
QUALITY_PAGE = "quality.html"
PARTIAL_SUFFIX = ".part"

# Names of tensors inside the safetensors files of a pack.
RECORDS_TENSOR = "records.{kind}"
FRAMES_TENSOR = "frames"
TABLE_TENSOR = "table"
SIZES_TENSOR = "sizes"
CONTENTS_TENSOR = "contents"
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
MAX_MANIFEST_BYTES = 32 * 2**20
MAX_RECORD_BYTES = 2**32 - PAGE
MAX_LAYERS = 65_536
MAX_EXPERTS = 65_536
MAX_KINDS = 256
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 1024
MAX_INTEGER = 2**62
MAX_DIMENSIONS = 8

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("BF16", "F16", "F32")
RAW_DTYPES = ("BF16", "F16", "F32")
BIAS_DTYPES = ("BF16", "F16", "F32")

DQ_BITS = (2, 3, 4)
DQ_GROUP = 32
DQ_BLOCK = 256
"""Consecutive values of an ``affine_dq`` matrix that share three numbers, of type ``DQ_DTYPE``."""
DQ_DTYPE = "BF16"

MXFP4_GROUP = 32
NVFP4_GROUP = 16
"""Input values that share a scale."""

GLOBAL_SCALES = ("none", "multiply", "divide")
"""What the scales of an ``nvfp4`` matrix go through with its ``global`` part."""

FP8_SCALE_DTYPES = ("F32", "BF16", "F16", "E8M0")
MAX_BLOCK = 65_536
"""Most rows or columns of a block that shares an fp8 scale."""

TENSOR_DTYPES = ("U8", "U32", "I32", "I64", "BF16", "F16", "F32")
"""Types of tensors in the files of a pack."""

PAGE_ALIGNED_FROM = 65536
"""Dense tensors of this many bytes and more start on a page."""

CODECS = ("raw", "zstd")
"""How records are stored: as they are, or each compressed into a frame of its own."""

FIRST_READER = "0.1.0"
"""The first version of flashpack that reads packs without required features."""

FEATURES = {
    "affine_dq": "0.1.0",
    "expert_bias": "0.1.0",
    "fp8_e4m3": "0.1.0",
    "int_tensors": "0.1.0",
    "mxfp4": "0.1.0",
    "nvfp4": "0.1.0",
    "zstd": "0.1.0",
}
"""Required features that this reader understands, and the first version of flashpack that has each."""

REFUSED_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
"""Files that some program would run or unpickle; a pack never holds them."""
