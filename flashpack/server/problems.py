"""What goes wrong in a request, in the words of the OpenAI API."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from flashpack.errors import ContextError, FlashpackError, FormatError, UsageError


class ApiError(Exception):
    """A request that gets an error with HTTP ``status``; ``param``: the field that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def kind(self) -> str:
        names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """As the OpenAI API writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """As the Anthropic API writes it."""
        names = {"server_error": "overloaded_error" if self.status in (503, 529) else "api_error"}
        return {"type": "error", "error": {"type": names.get(self.kind, self.kind), "message": self.message}}

    def response(self, anthropic: bool = False) -> JSONResponse:
        """With the headers that belong to it."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.anthropic_body() if anthropic else self.body(), self.status, headers)


def refused(error: Exception) -> ApiError:
    """An error before the first token: the request's fault, if it is one that requests can make."""
    if isinstance(error, ContextError):
        return ApiError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, UsageError | FormatError):
        return ApiError(400, str(error))
    return failed(error)


def failed(error: Exception) -> ApiError:
    """An error of the server; what is unknown is not told to strangers."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FlashpackError):
        return ApiError(500, str(error), code=error.code)
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
