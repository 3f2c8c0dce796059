"""The pack format, and nothing else: reading, writing and checking packs. Imports neither torch nor transformers."""

from flashpack.formats.findings import Finding
from flashpack.formats.manifest import Manifest
from flashpack.formats.reader import Pack
from flashpack.formats.records import Encoding, Projection, RecordKind
from flashpack.formats.verify import verify

__all__ = ["Encoding", "Finding", "Manifest", "Pack", "Projection", "RecordKind", "verify"]
