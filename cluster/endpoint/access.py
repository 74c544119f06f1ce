"""Who may come in: API keys to tenants, and each tenant's limits, as one ingress knows them.

`caller` and `require_admin` are what a route depends on:

    @router.delete("/v1/cache", dependencies=[Depends(require_admin)])
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from cluster.endpoint.keys import Caller, KeyRing, KeysDocument
from cluster.endpoint.limits import TenantBooks
from cluster.endpoint.refusals import ForbiddenError, UnauthorizedError
from cluster.endpoint.tenants import EVERYBODY, Tenant

logger = logging.getLogger(__name__)

_bearer = HTTPBearer(auto_error=False, description="an API key, as `Authorization: Bearer KEY`")


class Access:
    """The keys and the limits of one ingress. Without a document everybody may come in."""

    def __init__(
        self, document: KeysDocument | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._books: dict[str, TenantBooks] = {}
        self._share = 1.0
        self._document = document
        self._ring: KeyRing | None = None
        self.update(document)
        if document is None:
            logger.warning(
                "no API keys are configured (serve.keys_file): whoever reaches this endpoint may "
                "use it, and all share one cache scope unless they send a cache_salt"
            )

    @property
    def is_open(self) -> bool:
        """Whether no keys are asked for."""
        return self._ring is None

    def update(self, document: KeysDocument | None) -> None:
        """Use these keys and limits from now on; what runs goes on."""
        self._ring = KeyRing(document) if document is not None else None
        self._document = document

    def share_with(self, num_ingress: int) -> None:
        """Allow so much of every limit that all ingresses together allow all of it."""
        self._share = 1.0 / max(1, num_ingress)

    def caller(self, key: str | None) -> Caller:
        """Whose key this is; raises `UnauthorizedError`."""
        if self._ring is None:
            return Caller(EVERYBODY)
        if not key:
            raise UnauthorizedError(
                "this endpoint wants an API key: send the header `Authorization: Bearer KEY`"
            )
        return self._ring.caller(key)

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name; None when there is none, or no keys are configured."""
        return None if self._ring is None else self._ring.tenant(name)

    @contextmanager
    def entered(self, tenant: Tenant, num_choices: int = 1) -> Iterator[None]:
        """While a request of the tenant runs; raises `RateLimitedError` when it may not begin."""
        books = self._books.setdefault(tenant.name, TenantBooks())
        books.enter(tenant, self._share, self._clock(), num_choices)
        try:
            yield
        finally:
            books.leave(num_choices)


async def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Dependency: who asks; 401 without a known key."""
    access: Access = request.app.state.endpoint.access
    return access.caller(credentials.credentials if credentials is not None else None)


async def require_admin(request: Request, who: Annotated[Caller, Depends(caller)]) -> Caller:
    """Dependency: an admin key; 401 without a known key, 403 with one that is none."""
    if request.app.state.endpoint.access.is_open:
        raise ForbiddenError(
            "this needs an admin key, and no API keys are configured: "
            "`kvcommons keys create --tenant NAME --admin`, then set serve.keys_file"
        )
    if not who.is_admin:
        raise ForbiddenError("this needs an admin key, and the one that was sent is none")
    return who


CallerDependency = Annotated[Caller, Depends(caller)]
AdminDependency = Annotated[Caller, Depends(require_admin)]
