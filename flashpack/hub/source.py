"""What a card says of the checkpoint that a pack was made of: the pack itself does not know its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.errors import UsageError

if TYPE_CHECKING:
    from flashpack.converter.folder import SourceFolder
    from flashpack.converter.forecast import Dropped

MODEL = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
"""The name of a repository."""

_LICENSES = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """``name``: org/model on a hub. ``revision``: a commit, or what its user says. ``license``: fields of the front
    matter of a card. ``dropped``: tensors that are not in a pack; None if nobody looked."""

    name: str | None = None
    revision: str | None = None
    license: dict[str, str] | None = None
    dropped: list[Dropped] | None = None


def describe(name: str | None, license: str | None, checkpoint: str | None) -> BaseModel:
    """What the options say, and what ``checkpoint`` (a folder, or hf://org/model[@revision]) does; options first.

    ``name`` is ``org/model`` or ``org/model@revision``. Raises ``UsageError`` for another name or an odd license,
    ``SourceError`` if the checkpoint cannot be read.
    """
    found = BaseModel() if checkpoint is None else _read(checkpoint)
    revision = found.revision
    if name is not None:
        name, _, given = name.removeprefix("hf://").partition("@")
        if not re.fullmatch(MODEL, name):
            raise UsageError(f"--base-model {name}: write ORG/MODEL or ORG/MODEL@REVISION")
        revision = given or (revision if name == found.name else None)
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", license):
        raise UsageError(f"--license {license}: a name that hubs know, for example apache-2.0 or other")
    terms = found.license if license is None else {"license": license}
    return BaseModel(name or found.name, revision, terms, found.dropped)


def _read(checkpoint: str) -> BaseModel:
    from flashpack.converter.convert import bound
    from flashpack.converter.forecast import group

    source = bound(checkpoint)
    folder = source.checkpoint.folder
    try:
        dropped = {name: source.tensors[name].nbytes for name in source.bindings.dropped}
        origin = folder.origin
        return BaseModel(origin.get("hub"), origin.get("commit"), _license(folder), group(dropped, set(source.tensors)))
    finally:
        folder.close()


def _license(folder: SourceFolder) -> dict[str, str] | None:
    """What the front matter of the checkpoint's own card says, if it has one."""
    if "README.md" not in folder.files():
        return None
    from huggingface_hub import RepoCard

    try:
        card: Any = RepoCard(folder.read("README.md").decode(errors="replace"), ignore_metadata_errors=True)
        data: dict[str, Any] = card.data.to_dict()
    except Exception:  # whatever a parser of YAML says about a stranger's file: it tells no license
        return None
    found = {key: data[key] for key in _LICENSES if isinstance(data.get(key), str)}
    return found if "license" in found else None
