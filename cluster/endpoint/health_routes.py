"""Routes for those who watch the endpoint: can it generate, should it get requests, figures."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from actors.engine import GenerationRequest, SamplingParams
from cluster.endpoint.documents import ERRORS
from cluster.endpoint.errors import error_body
from cluster.endpoint.responses import json_response
from cluster.endpoint.router_view import snapshot_of
from cluster.endpoint.service import Endpoint
from shared_cache.errors import KvcommonsError, ReplicaUnavailableError

FRESH_S = 10.0
"""A token that came out so recently shows that tokens come out."""

PROBE_TIMEOUT_S = 20.0
CHECK_TIMEOUT_S = 3.0

router = APIRouter()


@router.get("/health", responses=ERRORS)
async def health(request: Request) -> Response:
    """200 when tokens come out: one did just now, or one does when it is asked for; else 503."""
    endpoint: Endpoint = request.app.state.endpoint
    if endpoint.clock() - endpoint.last_token_s <= FRESH_S:  # whatever the router says
        return _report([], None)
    replicas, reason = await _replicas(endpoint)
    if replicas is None or any(replicas.values()):
        reason = await _reason_not_generating(endpoint)
    return _report([reason], replicas)


@router.get("/ready", responses=ERRORS)
async def ready(request: Request) -> Response:
    """200 when this ingress should get requests, else 503 with the reasons."""
    endpoint: Endpoint = request.app.state.endpoint
    checks = asyncio.gather(*(_reason_not_met(check) for check in endpoint.readiness))
    replicas, reason = await _replicas(endpoint)
    return _report([reason, *await checks], replicas)


@router.get("/metrics", responses=ERRORS)
async def metrics(request: Request) -> Response:
    """Where Prometheus finds the figures: Ray's own port on each machine."""
    url = request.app.state.endpoint.metrics_url
    if url is None:
        text = "figures are on the metrics port of Ray, which is not running here"
        return json_response(error_body(text, "invalid_request_error"), 404)
    return RedirectResponse(url)


def _report(reasons: Sequence[str | None], replicas: dict[str, bool] | None) -> Response:
    told = [one for one in reasons if one is not None]
    body: dict[str, Any] = {"status": "unavailable" if told else "ok", "reasons": told}
    if replicas is not None:
        body["replicas"] = replicas
    return json_response(body, 503 if told else 200)


async def _replicas(endpoint: Endpoint) -> tuple[dict[str, bool] | None, str | None]:
    """Which replicas are up, None where the router does not tell; and why none is known to be."""
    try:
        snapshot = await snapshot_of(endpoint.router)
    except ReplicaUnavailableError as error:
        return None, str(error)
    replicas = {one.replica_id: one.alive for one in snapshot.replicas}
    return replicas, None if any(replicas.values()) else "no replica is up"


async def _reason_not_met(check: Callable[[], Awaitable[str | None]]) -> str | None:
    try:
        return await asyncio.wait_for(check(), CHECK_TIMEOUT_S)
    except asyncio.TimeoutError:
        return f"a condition of readiness could not be looked at within {CHECK_TIMEOUT_S:g} s"


async def _reason_not_generating(endpoint: Endpoint) -> str | None:
    """Ask for one token; nothing of so short a prompt is kept anywhere."""
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    probe = GenerationRequest("health", endpoint.encoder.probe, sampling)

    async def first_token() -> None:
        async with aclosing(endpoint.dispatcher.generate(probe)) as chunks:
            async for _ in chunks:
                endpoint.last_token_s = endpoint.clock()
                return

    try:
        await asyncio.wait_for(first_token(), PROBE_TIMEOUT_S)
    except asyncio.TimeoutError:  # another class before Python 3.11
        return f"no token came out within {PROBE_TIMEOUT_S:g} s"
    except KvcommonsError as error:
        return str(error)
    return None
