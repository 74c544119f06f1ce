"""The routes of the cache's administration: look, explain, delete, warm, pin. Admin keys only.

They look into all tenants' blocks, so an ordinary key may use none of them.
"""

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engine import GenerationRequest, SamplingParams
from actors.questions import AskedReplica
from cluster.cache_admin import MAX_PIN_S, CacheAdmin
from cluster.canaries import asked_replicas
from cluster.endpoint.access import require_admin
from cluster.endpoint.documents import ERRORS, ErrorBody, body_of
from cluster.endpoint.errors import error_body
from cluster.endpoint.keys import Caller
from cluster.endpoint.requests import Prompt
from cluster.endpoint.responses import json_response
from cluster.endpoint.router_view import snapshot_of
from cluster.endpoint.service import Asked, Endpoint
from cluster.endpoint.waiting import waited_for
from shared_cache.errors import ReplicaUnavailableError, RequestError
from shared_cache.hashing import ReuseScope

AdminDependency = Annotated[Caller, Depends(require_admin)]

ADMIN_ERRORS = {
    **ERRORS,
    403: {"model": ErrorBody, "description": "the key is not an admin's, or there are no keys"},
}

router = APIRouter()


class PromptsBody(BaseModel):
    """Prompts, as texts or as token ids, and whose they are (default: the key's own tenant)."""

    model_config = ConfigDict(extra="forbid")

    prompts: Prompt
    tenant: str | None = None
    cache_salt: str | None = None

    @property
    def all_prompts(self) -> Sequence[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompts, str) or isinstance(self.prompts[0], int):
            return [self.prompts]
        return self.prompts


class DeleteBody(PromptsBody):
    """What to delete: the full blocks of these prompts, or everything."""

    prompts: Prompt | None = None  # type: ignore[assignment]
    all: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "DeleteBody":
        if self.all == (self.prompts is not None):
            raise ValueError('give `prompts`, or `"all": true` to delete every block')
        return self


class WarmBody(PromptsBody):
    """What to have computed and stored; `pin_s`: and to keep in memory for so long."""

    pin_s: float = Field(0.0, ge=0, le=MAX_PIN_S)


class PinBody(PromptsBody):
    """What to keep in memory, and for how long."""

    ttl_s: float = Field(gt=0, le=MAX_PIN_S)


@router.get("/v1/cache", responses=ADMIN_ERRORS)
async def overview(request: Request, _: AdminDependency) -> Response:
    """What every replica has cached and has done."""
    return json_response(await _admin(request).overview())


@router.get("/v1/cache/explain", responses=ADMIN_ERRORS)
async def explain(request: Request, _: AdminDependency, request_id: str = "") -> Response:
    """For a recent request: which block was the first to be computed, and why it was not loaded."""
    if not request_id:
        raise RequestError("give `?request_id=`, the `id` of an answer")
    found = await _admin(request).explain(request_id)
    if not found:
        text = (
            f"no replica remembers a request {request_id!r}: it was shorter than a block, is too "
            "long ago, or ran on a replica that was restarted since"
        )
        return json_response(error_body(text, "invalid_request_error", param="request_id"), 404)
    return json_response({"requests": [one.as_data() for one in found]})


@router.delete("/v1/cache", responses=ADMIN_ERRORS, openapi_extra=body_of(DeleteBody))
async def delete(request: Request, who: AdminDependency) -> Response:
    """Remove blocks from the memory of all machines and from the store; those in use stay."""
    body = DeleteBody.model_validate_json(await request.body())
    if body.all:
        return json_response(asdict(await _admin(request).forget_all()))
    prompts = await _tokens(request, body)
    forgotten = await _admin(request).forget(prompts, _scope(request, who, body))
    return json_response(asdict(forgotten))


@router.post("/v1/cache/warm", responses=ADMIN_ERRORS, openapi_extra=body_of(WarmBody))
async def warm(request: Request, who: AdminDependency) -> Response:
    """Have prompts computed, as far as they are not cached, and stored for all replicas."""
    body = WarmBody.model_validate_json(await request.body())
    prompts, scope = await _tokens(request, body), _scope(request, who, body)
    endpoint: Endpoint = request.app.state.endpoint
    asked = Asked(
        f"warm-{uuid.uuid4().hex}", prompts, SamplingParams(max_tokens=1, ignore_eos=True), scope
    )
    work = _warm(endpoint, _admin(request), asked, body.pin_s)
    answer = await waited_for(work, request.receive, endpoint.config.request_timeout_s)
    return json_response(answer)


@router.post("/v1/cache/pin", responses=ADMIN_ERRORS, openapi_extra=body_of(PinBody))
async def pin(request: Request, who: AdminDependency) -> Response:
    """Keep prompts in the memory of every machine, for a time; fetches them there if need be."""
    body = PinBody.model_validate_json(await request.body())
    prompts, scope = await _tokens(request, body), _scope(request, who, body)
    return json_response({"pinned_blocks": await _admin(request).pin(prompts, scope, body.ttl_s)})


@router.post("/v1/cache/unpin", responses=ADMIN_ERRORS, openapi_extra=body_of(PromptsBody))
async def unpin(request: Request, who: AdminDependency) -> Response:
    """End the pins of prompts before their time."""
    body = PromptsBody.model_validate_json(await request.body())
    prompts, scope = await _tokens(request, body), _scope(request, who, body)
    return json_response({"unpinned_blocks": await _admin(request).pin(prompts, scope, 0.0)})


def _admin(request: Request) -> CacheAdmin:
    """Whoever asks the replicas: those that the router knows, unless the app has its own."""
    state = request.app.state
    own: CacheAdmin | None = getattr(state, "cache_admin", None)
    if own is not None:
        return own
    endpoint: Endpoint = state.endpoint

    async def find() -> list[AskedReplica]:
        snapshot = await snapshot_of(endpoint.router)
        away: Any = _Away()  # it is named where one is told which were not reached
        dead = [AskedReplica(one.replica_id, away) for one in snapshot.replicas if not one.alive]
        return asked_replicas([one.replica_id for one in snapshot.replicas if one.alive]) + dead

    return CacheAdmin(find)


class _Away:
    """Stands for a replica that the router takes for dead: nothing is asked of it."""

    async def ask(self, _: object) -> Any:
        raise ReplicaUnavailableError("the router takes it for dead")

    traces = flush = ask


async def _warm(
    endpoint: Endpoint, admin: CacheAdmin, asked: Asked, pin_s: float
) -> dict[str, Any]:
    """Have these prompts computed, stored, and pinned if that is wanted; the route's answer."""
    receipts = [await _warmed(endpoint, one) for one in asked.requests()]
    answer: dict[str, Any] = {"prompts": receipts}
    # Before the pins: other machines find only what is stored.
    answer["stored"] = await admin.flush({one["replica"] for one in receipts})
    if pin_s:
        answer["pinned_blocks"] = await admin.pin(asked.prompts, asked.scope, pin_s)
    return answer


async def _warmed(endpoint: Endpoint, one: GenerationRequest) -> dict[str, Any]:
    """The receipt of one prompt, and where it was computed."""
    receipt: dict[str, Any] = {}
    async with aclosing(endpoint.dispatcher.generate(one)) as stream:
        async for routed in stream:
            if routed.chunk.receipt is not None:
                receipt = {"replica": routed.replica_id, **asdict(routed.chunk.receipt)}
    if not receipt:
        raise RequestError("a prompt was answered without a receipt")
    return receipt


async def _tokens(request: Request, body: PromptsBody) -> list[tuple[int, ...]]:
    endpoint: Endpoint = request.app.state.endpoint
    return [
        await asyncio.to_thread(endpoint.encoder.text, one) if isinstance(one, str) else tuple(one)
        for one in body.all_prompts
    ]


def _scope(request: Request, who: Caller, body: PromptsBody) -> ReuseScope:
    """Under which salt the prompts of that tenant are stored."""
    if body.tenant is None:
        return who.tenant.scope(body.cache_salt)
    endpoint: Endpoint = request.app.state.endpoint
    tenant = endpoint.access.tenant(body.tenant)
    if tenant is None:
        raise RequestError(f"there is no tenant {body.tenant!r} in serve.keys_file")
    return tenant.scope(body.cache_salt)
