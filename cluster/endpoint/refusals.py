"""What the endpoint refuses by itself, each with its HTTP status and OpenAI's words for it.

Clients decide by these whether to try again and when: a wrong status makes them give up on a full
server, or hammer one that will never answer.
"""

from shared_cache.errors import KvcommonsError


class RefusedError(KvcommonsError):
    """A request that is answered with `status` at once; nothing of it has run.

    `kind` and `code` are OpenAI's `error.type` and `error.code`. `retry_after_s` is set where the
    same request may succeed later.
    """

    status = 400
    kind = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[str, float | None]]:
        return type(self), (str(self), self.retry_after_s)


class UnauthorizedError(RefusedError):
    """No key, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RefusedError):
    """A known key that may not do this."""

    status = 403
    kind = "permission_error"
    code = "admin_key_required"


class TooLargeError(RefusedError):
    """A body beyond the configured size."""

    status = 413
    code = "request_too_large"


class SlowBodyError(RefusedError):
    """A body that is not there in time."""

    status = 408
    code = "request_body_timeout"


class RateLimitedError(RefusedError):
    """A tenant has used up what it may send for now, or has too much running."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class OverloadedError(RefusedError):
    """All places are taken, whoever asks."""

    status = 429
    kind = "overloaded_error"
    code = "server_overloaded"


class TimedOutError(RefusedError):
    """Nothing came out in the time that a request may take."""

    status = 504
    kind = "timeout_error"
    code = "request_timeout"


class ClientGoneError(RefusedError):
    """Nobody waits for the answer any more; the status is for logs."""

    status = 499
    code = "client_closed_request"
