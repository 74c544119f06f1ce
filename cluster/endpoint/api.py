"""The HTTP application of one ingress: routes, errors in OpenAI's shape, who may send what."""

import asyncio

from fastapi import FastAPI, Request, Response
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import admin_api
from cluster.endpoint import health_routes, openai_routes
from cluster.endpoint.access import Access
from cluster.endpoint.documents import describe_bodies
from cluster.endpoint.errors import error_body, failure, invalid
from cluster.endpoint.refusals import RefusedError, SlowBodyError, TooLargeError
from cluster.endpoint.responses import json_response
from cluster.endpoint.service import Endpoint
from cluster.http_metrics import count_responses
from shared_cache.errors import KvcommonsError

BODY_TIMEOUT_S = 60.0


def create_api(endpoint: Endpoint) -> FastAPI:
    """The application that serves this endpoint."""
    api = FastAPI(
        title="kvcommons", description="The OpenAI API over replicas that share one cache"
    )
    api.state.endpoint = endpoint
    api.include_router(openai_routes.router)
    api.include_router(health_routes.router)
    api.include_router(admin_api.router)
    api.add_exception_handler(ValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(KvcommonsError, _failed)
    api.add_exception_handler(Exception, _failed)  # the server logs it, and raises it further
    api.add_middleware(
        Doorkeeper, access=endpoint.access, max_bytes=int(endpoint.config.max_body_bytes)
    )
    count_responses(api, openai_routes.router, health_routes.router, admin_api.router)
    describe_bodies(api)
    return api


class Doorkeeper:
    """Middleware: who has no key gets 401 before anything of a body is read.

    A body that is too long gets 413 before more of it than that is in memory, one that does not
    come in `BODY_TIMEOUT_S` 408.
    """

    def __init__(self, app: ASGIApp, access: Access, max_bytes: int) -> None:
        self._app = app
        self._access = access
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, send)
            return
        try:
            self._access.caller(_key_of(scope))
            messages = await asyncio.wait_for(self._body(scope, receive), BODY_TIMEOUT_S)
        except RefusedError as error:
            await _refused(error)(scope, receive, send)
            return
        except asyncio.TimeoutError:
            late = SlowBodyError(f"the body did not come within {BODY_TIMEOUT_S:g} s")
            await _refused(late)(scope, receive, send)
            return
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> list[Message]:
        """The messages of the body; raises `TooLargeError`."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit():
            self._check(int(length))
        messages: list[Message] = []
        num_bytes = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            num_bytes += len(messages[-1].get("body", b""))
            self._check(num_bytes)
        return messages

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"the body is longer than serve.max_body_bytes = {self._max_bytes}")


def _refused(error: RefusedError) -> Response:
    status, body, headers = failure(error)
    return json_response(body, status, {**headers, "Connection": "close"})


def _key_of(scope: Scope) -> str | None:
    """The key in the `Authorization` header, if it has one."""
    header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    scheme, key = get_authorization_scheme_param(header)
    return key if scheme.lower() == "bearer" else None


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    return json_response(invalid(error.errors(include_url=False, include_context=True)), 400)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return json_response(body, error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    status, body, headers = failure(error)
    return json_response(body, status, headers)
