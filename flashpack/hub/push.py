"""A pack to a hub: proven before, sent file by file, and there all at once with a single commit.

Large files are sent before the commit that names them, so an interruption leaves the repository as it was, and what was
sent is not sent again. Afterwards the hub's hashes are compared with our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flashpack.converter.hub import open_hub
from flashpack.errors import IntegrityError, OutputError, UsageError
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import Manifest
from flashpack.hub.answers import hub_errors
from flashpack.hub.card import README
from flashpack.hub.pull import git_hash
from flashpack.hub.source import MODEL
from flashpack.version import __version__


@dataclass(frozen=True)
class Pushed:
    """``commit``: of the repository, that has the pack. ``files`` and ``bytes`` are the pack's."""

    repo: str
    url: str
    commit: str
    identity: str
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_name(repo: str) -> str:
    """The repository's name, ``org/name``. Raises ``UsageError``."""
    name = repo.removeprefix("hf://")
    if not re.fullmatch(MODEL, name):
        raise UsageError(f"{repo}: not the name of a repository, ORG/NAME; --revision names a branch")
    return name


def push(
    pack: Pack,
    repo: str,
    sums: dict[str, str],
    card: str,
    own_card: bool = False,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    begin: Callable[[str, int], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Pushed:
    """Send a pack, which the caller has verified, and its ``card`` to ``repo`` (``check_name``'s), which is made if it
    is not there. Run again after an interruption to continue.

    ``sums``: of ``card.checksums``. ``own_card``: the card is the user's own, and takes the place of one that is there;
    else that is only replaced with the pack. ``private``: of a repository that is made. ``revision``: a branch, made if
    it is not there; default: main. ``overwrite``: whether another pack that is there may be replaced; files that are
    not that pack's stay. ``begin`` is called with what is done next and its bytes, ``progress`` with bytes.

    Raises ``UsageError`` for a card that is none, ``OutputError`` for what the hub refuses and if another pack is
    there, ``IntegrityError`` if something arrived in another form.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard

    try:
        RepoCard(card)
    except Exception as e:  # of a parser of YAML
        raise UsageError(f"the card: what stands between its first two lines of --- is no metadata: {e}") from e
    begin, progress = begin or (lambda text, total: None), progress or (lambda count: None)
    name = f"hf://{repo}" + (f"@{revision}" if revision else "")
    api = HfApi(library_name="flashpack", library_version=__version__)
    with hub_errors(name, OutputError):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    there = _look(name)
    if there.identity not in (None, pack.identity) and not overwrite:
        raise OutputError(f"{name}: holds another pack, {there.identity}; --overwrite replaces it, or name another")
    sizes = {path: (pack.folder / path).stat().st_size for path in sums}
    begin("uploading", sum(sizes.values()))
    adds = [CommitOperationAdd(path, str(pack.folder / path)) for path in sums]
    if README not in sums and (own_card or not there.card or there.identity != pack.identity):
        adds.append(CommitOperationAdd(README, card.encode()))
    gone = [CommitOperationDelete(path, is_folder=False) for path in sorted(there.files - set(sums))]
    with hub_errors(name, OutputError):
        for add in adds:
            # One by one: the hub keeps each from then on, also if the next one fails.
            api.preupload_lfs_files(repo, [add], revision=revision, free_memory=False)
            progress(sizes.get(add.path_in_repo, 0))
        done = api.create_commit(repo, [*adds, *gone], commit_message=f"Pack {pack.identity}", revision=revision)
    _compare(f"hf://{repo}@{done.oid}", pack, sums)
    url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    return Pushed(repo, url, done.oid, pack.identity, len(sums), sum(sizes.values()))


@dataclass(frozen=True)
class _There:
    """What a repository has: the identity and the files of a pack, and whether it has a card."""

    identity: str | None
    files: set[str]
    card: bool


def _look(name: str) -> _There:
    folder = open_hub(name)
    try:
        names = folder.files()
        if C.MANIFEST not in names:
            return _There(None, set(), README in names)
        raw = folder.read(C.MANIFEST)
        return _There(hexdigest(raw), set(Manifest.from_bytes(raw).by_path), README in names)
    finally:
        folder.close()


def _compare(name: str, pack: Pack, sums: dict[str, str]) -> None:
    """The hub has what we have, by its own hashes."""
    folder = open_hub(name)
    try:
        for path, sha256 in sums.items():
            state = folder.state(path)
            own = git_hash((pack.folder / path).read_bytes()) if "git-sha1" in state else sha256
            if own not in state.values():
                raise IntegrityError(f"{folder.where(path)}: the hub has other bytes than were sent; push again")
    finally:
        folder.close()
