"""What huggingface_hub raises, as one line that says what to do. Never its own texts: they have signed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashpack.errors import FlashpackError

_AGAIN = "run the same command again to continue"


@contextmanager
def hub_errors(name: str, error: type[FlashpackError]) -> Iterator[None]:
    """Errors of the hub and of the way to it become ``error``; ``name`` is what is asked for: ``hf://org/model``."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise error(f"{name}: offline mode is on (HF_HUB_OFFLINE); turn it off") from None
    except errors.HfHubHTTPError as e:
        raise error(f"{name}: {_refusal(e)}") from None
    except httpx2.TransportError as e:
        raise error(f"{name}: no connection ({type(e).__name__}); {_AGAIN}") from None
    except (FlashpackError, OSError):
        raise
    except Exception as e:
        # huggingface_hub wraps what happened to one file of several; hf_xet has errors of its own.
        cause = e.__cause__
        if str(e).startswith("Invalid metadata in README.md"):
            raise error(f"{name}: the hub does not accept the metadata at the beginning of the card") from None
        if isinstance(cause, errors.HfHubHTTPError):
            raise error(f"{name}: {_refusal(cause)}") from None
        what = type(e).__name__ if cause is None else f"{type(e).__name__}, {type(cause).__name__}"
        raise error(f"{name}: the transfer failed ({what}); {_AGAIN}") from None


def _refusal(e: Exception) -> str:
    from huggingface_hub import errors

    login = "log in ('hf auth login', or HF_TOKEN) as somebody who may"
    if isinstance(e, errors.GatedRepoError):
        return f"gated: accept the model's terms on its page, and {login}"
    assert isinstance(e, errors.HfHubHTTPError)
    status = e.response.status_code
    if status in (401, 403):
        return f"the hub does not allow it ({status}); {login}, or check the name"
    if isinstance(e, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return f"the hub has no such model or revision, or it is private; check the name, or {login}"
    again = f"; {_AGAIN}" if status in (408, 409, 412, 425, 429) or status >= 500 else ""
    return f"the hub answers {status}{again}"
