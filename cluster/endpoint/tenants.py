"""A tenant: whose blocks are kept apart from everybody else's, and what it may use.  Pure.

What it prevents: a client that reaches another tenant's blocks, or tells from `cached_tokens` what
others have asked, by choosing its `cache_salt`. What a client sends is only ever added to the
tenant's own salt, so it makes the scope smaller.
"""

from dataclasses import dataclass

from shared_cache.hashing import SCOPE_SEPARATOR, ReuseScope


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant. Without a `salt` it is everybody, on an endpoint without keys.

    `group_salt` is that of the group whose members share; None limits nothing.
    """

    name: str
    salt: str | None = None
    group_salt: str | None = None
    host_bytes: int | None = None
    store_bytes: int | None = None
    requests_per_minute: float | None = None
    max_concurrent: int | None = None

    def scope(self, client_salt: str | None) -> ReuseScope:
        """Which requests may reuse the blocks of one that came with this `cache_salt`.

        Without one: all of the tenant, or of its group. With one: those of the same tenant with the
        same salt, whatever its group.
        """
        if self.salt is None or client_salt is None:
            return ReuseScope(client_salt or self.group_salt or self.salt)
        return ReuseScope(f"{self.salt}{SCOPE_SEPARATOR}{client_salt}")


EVERYBODY = Tenant("")
"""Whoever asks an endpoint without keys."""
