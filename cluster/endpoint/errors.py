"""Whatever goes wrong -> status, headers and OpenAI's error object."""

import math
from collections.abc import Sequence
from typing import Any

from cluster.endpoint.refusals import RefusedError
from shared_cache.errors import (
    PromptTooLongError,
    ReplicaBusyError,
    ReplicaUnavailableError,
    RequestError,
)

UNAVAILABLE_RETRY_S = 5.0
"""When to come again while no replica can serve: they are restarted within seconds or minutes."""

Failure = tuple[int, dict[str, Any], dict[str, str]]


def failure(error: Exception, busy_retry_s: float = 1.0) -> Failure:
    """Status, body and headers for an error of ours; anything else is a 500 that tells nothing.

    `busy_retry_s` is when to come again if all replicas are full.
    """
    if isinstance(error, RefusedError):
        body = error_body(str(error), error.kind, code=error.code)
        headers = _retry(error.retry_after_s)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error.status, body, headers
    if isinstance(error, RequestError):
        return 400, error_body(str(error), "invalid_request_error", code=_code(error)), {}
    if isinstance(error, ReplicaBusyError):
        body = error_body(str(error), "overloaded_error", code="server_overloaded")
        return 429, body, _retry(busy_retry_s)
    if isinstance(error, ReplicaUnavailableError):
        body = error_body(str(error), "service_unavailable_error", code="no_replica")
        return 503, body, _retry(UNAVAILABLE_RETRY_S)
    return 500, error_body("internal error; the server's log has the details", "server_error"), {}


def unknown_model(asked: str, served: str) -> dict[str, Any]:
    """The body of a 404."""
    return error_body(
        f"the model {asked!r} is not served here; the one that is: {served!r}",
        "invalid_request_error",
        param="model",
        code="model_not_found",
    )


def invalid(errors: Sequence[Any]) -> dict[str, Any]:
    """The body of a 400 for what pydantic found wrong in a request; names the first parameter."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    is_place_in_text = first["type"] == "json_invalid"
    param = None if is_place_in_text or not names else names[0]
    text = "this parameter is not supported" if _is_unsupported(first) else first["msg"]
    message = f"{'.'.join(names) or 'body'}: {text.removeprefix('Value error, ')}"
    return error_body(message, "invalid_request_error", param=param)


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _code(error: RequestError) -> str | None:
    return "context_length_exceeded" if isinstance(error, PromptTooLongError) else None


def _retry(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def _is_unsupported(error: Any) -> bool:
    """Whether no value, or none but an empty one, would have been accepted."""
    is_only_empty = error["type"] == "too_long" and error["ctx"]["max_length"] == 0
    return is_only_empty or error["type"] in ("extra_forbidden", "none_required")
