"""Counts what an ingress answers, by route and status: refusals and failures too.

Those who are refused (no key, over a limit, too long, no replica) never get to a dispatcher, which
counts all else: without this nobody would see that most requests are turned away.
"""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ray_metrics import ResponseCounter

UNKNOWN_ROUTE = "other"
"""Where no route is meant: paths that clients make up are no tags, for there is no end of them."""


def count_responses(api: FastAPI, *routers: APIRouter) -> None:
    """Count the responses of this application, and of the middleware that it has so far.

    `routers` are those that it includes, each without a prefix.
    """
    found = [*api.routes, *(route for router in routers for route in router.routes)]
    routes = [route for route in found if isinstance(route, Route)]
    counter = ResponseCounter([*(route.path_format for route in routes), UNKNOWN_ROUTE])
    api.add_middleware(CountResponses, routes=routes, counter=counter)


class CountResponses:
    """Middleware: counts a response when it begins."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route], counter: ResponseCounter) -> None:
        self._app = app
        self._routes = routes
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def counted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._counter.add(self._route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not has_begun:  # it becomes a response further out
                self._counter.add(self._route(scope), 500)
            raise

    def _route(self, scope: Scope) -> str:
        """The template of the route that is meant, also by a request that did not get there."""
        found = (one for one in self._routes if one.matches(scope)[0] is not Match.NONE)
        return next((one.path_format for one in found), UNKNOWN_ROUTE)
