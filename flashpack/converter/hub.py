"""A model repository of a Hugging Face hub, at one commit: ``hf://org/model[@revision]``.

huggingface_hub knows the hub: HF_ENDPOINT, tokens, offline mode, refusals. It lists the files with their sizes and
hashes; the bytes come by ranges. A commit never changes, so nothing needs to be compared with an earlier state.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from flashpack.converter.remote import RemoteFolder
from flashpack.converter.transfer import Attempts, RemoteFile, Transfer, retry_after
from flashpack.errors import SourceError
from flashpack.version import __version__

_LOGIN = "log in ('hf auth login', or HF_TOKEN) as somebody who may read it"


class Pinned(str):
    """``hf://org/model[@revision]``, of which the commit is known."""

    commit: str


def pin(src: str, origin: dict[str, Any]) -> str:
    """``src`` at the commit of ``origin``, if that is of the same repository and revision."""
    repo, revision = _parse(src)
    commit = origin.get("commit")
    if (origin.get("hub"), origin.get("revision")) != (repo, revision) or not isinstance(commit, str):
        return src
    pinned = Pinned(src)
    pinned.commit = commit
    return pinned


def open_hub(src: str) -> RemoteFolder:
    """The repository, at the commit that the revision is now, or that ``src`` is pinned to."""
    repo, revision = _parse(src)
    return HubFolder(repo, revision, src.commit if isinstance(src, Pinned) else revision)


def _parse(src: str) -> tuple[str, str]:
    """Repository and revision."""
    repo, separator, revision = src.partition("://")[2].partition("@")
    repo = repo.rstrip("/")
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}(/{part})?", repo) or (separator and not re.fullmatch(r"[^\s?#%\\]+", revision)):
        raise SourceError(f"{src}: not hf://organisation/model or hf://organisation/model@revision")
    return repo, revision or "main"


class HubFolder(RemoteFolder):
    """The files of ``repo`` at ``commit`` (or what names it)."""

    def __init__(self, repo: str, revision: str, commit: str) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(library_name="flashpack", library_version=__version__)
        terms = f"accept the model's terms at {constants.ENDPOINT}/{repo}, if it has any, and {_LOGIN}"
        super().__init__(f"hf://{repo}", Transfer(headers, terms))
        try:
            info = self._info(repo, commit)
            if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40,64}", info.sha):
                raise SourceError(f"{self.name}: the hub names no commit for {commit}")
            self.origin = {"hub": repo, "revision": revision, "commit": info.sha}
            self._hashes: dict[str, tuple[str, str]] = {}
            for sibling in info.siblings or []:
                name = sibling.rfilename
                if type(sibling.size) is not int or sibling.blob_id is None:
                    raise SourceError(f"{self.where(name)}: the hub tells no size or hash of the file")
                self._hashes[name] = ("sha256", sibling.lfs.sha256) if sibling.lfs else ("git-sha1", sibling.blob_id)
                url = hf_hub_url(repo, name, revision=info.sha)
                self._files[name] = RemoteFile(self.where(name), url, sibling.size, linked=self._hashes[name][1])
        except BaseException:
            self.close()
            raise

    def _info(self, repo: str, revision: str) -> Any:
        """What the hub says of the repository."""
        import httpx2
        from huggingface_hub import HfApi, errors

        transfer = self._transfer
        attempts = Attempts(f"{self.name}: asking the hub", transfer.policy, [transfer.closed], transfer.answered)
        api = HfApi(library_name="flashpack", library_version=__version__)
        while True:
            try:
                # Without the error's cause: its text has addresses in it.
                return api.model_info(repo, revision=revision, files_metadata=True, timeout=transfer.policy.read)
            except errors.OfflineModeIsEnabled:
                raise SourceError(
                    f"{self.name}: offline mode is on (HF_HUB_OFFLINE); turn it off, or name the folder of a download"
                ) from None
            except errors.GatedRepoError:
                raise SourceError(
                    f"{self.name}: gated: accept the model's terms at {api.endpoint}/{repo}, and {_LOGIN}"
                ) from None
            except errors.RepositoryNotFoundError:
                raise SourceError(
                    f"{self.name}: the hub has no such model, or it is private; check the name, or {_LOGIN}"
                ) from None
            except errors.RevisionNotFoundError:
                raise SourceError(f"{self.name}: the model has no revision {revision}") from None
            except errors.HfHubHTTPError as e:
                status = e.response.status_code
                transfer.answered.set()
                if status not in (408, 425, 429) and status < 500:
                    raise SourceError(f"{self.name}: the hub answers {status}") from None
                attempts.failed(f"the hub answers {status}", retry_after(e.response.headers.get("retry-after")))
            except httpx2.TransportError as e:
                attempts.failed(f"no connection ({type(e).__name__})")

    def state(self, file: str) -> dict[str, Any]:
        """Size and hash of the file at this commit."""
        size = self.size(file)
        kind, value = self._hashes[file]
        return {"size": size, kind: value}

    def _proven(self, file: str, data: bytes) -> bytes:
        kind, expected = self._hashes[file]
        if kind == "sha256":
            found = hashlib.sha256(data).hexdigest()
        else:
            found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != expected:
            raise SourceError(f"{self.where(file)}: damaged on the way: {kind} {found}, the hub says {expected}")
        return data
