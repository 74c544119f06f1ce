"""What one tenant may send: so many requests a minute, so many choices at a time.  Pure.

Each ingress keeps its own books and allows its share of a limit, so that no request waits for
another process to say yes. Time is given, not read.
"""

from dataclasses import dataclass

from cluster.endpoint.refusals import RateLimitedError
from cluster.endpoint.tenants import Tenant

MINUTE_S = 60.0


@dataclass(slots=True)
class TenantBooks:
    """What one tenant has running here, and how many requests it may still begin."""

    num_running: int = 0
    tokens: float | None = None
    filled_s: float = 0.0

    def enter(self, tenant: Tenant, share: float, now_s: float, num_choices: int = 1) -> None:
        """Begin a request; `RateLimitedError` when a limit times `share` is reached.

        Its choices count each as one that runs, all together as one that was sent.
        """
        limit = tenant.max_concurrent
        if limit is not None and self.num_running + num_choices > max(1, round(limit * share)):
            raise RateLimitedError(
                f"tenant {tenant.name!r} has {self.num_running} choices running here, and may have "
                f"no {num_choices} more (max_concurrent: {limit}); send this request when others "
                "have ended, or ask for fewer choices",
                retry_after_s=1.0,
            )
        if tenant.requests_per_minute is not None:
            self._take(tenant.name, tenant.requests_per_minute * share, now_s)
        self.num_running += num_choices

    def leave(self, num_choices: int = 1) -> None:
        """A request that had begun has ended."""
        self.num_running -= num_choices

    def _take(self, name: str, per_minute: float, now_s: float) -> None:
        """One token of a bucket that holds a minute's worth and is full at first."""
        most, rate = max(1.0, per_minute), per_minute / MINUTE_S
        left = most if self.tokens is None else self.tokens + rate * (now_s - self.filled_s)
        self.tokens, self.filled_s = min(most, left), now_s
        if self.tokens < 1:
            raise RateLimitedError(
                f"tenant {name!r} has sent as many requests as it may "
                f"({per_minute:g} a minute here); send this one later",
                retry_after_s=(1 - self.tokens) / rate,
            )
        self.tokens -= 1
