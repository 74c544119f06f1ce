"""The Serve application: the OpenAI API in front of one cluster.

    serve run cluster.app:build config=configs/cpu.yaml

`Driver` owns the cluster, so deleting the application ends every actor of it. `Ingress` holds no
state worth keeping: it may run several times, and finds router and replicas by name.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.config import ModelSource
from actors.engine import GenerationRequest, SamplingParams
from actors.streams import merge
from cluster import openai_api
from cluster.clients import RayRouterClient, connect
from cluster.config import ClusterConfig, load_config
from cluster.driver import Cluster
from cluster.http_stream import Chunks, collect, event_stream
from cluster.openai_api import Reply
from cluster.openai_requests import COMPLETION_MAX_TOKENS, ChatRequest, CompletionRequest
from cluster.prompts import PromptEncoder
from cluster.ray_metrics import RayMetrics
from shared_cache.errors import ConfigError, KvcommonsError, ReplicaUnavailableError
from shared_cache.hashing import ReuseScope

STOP_MARGIN_S = 15.0
"""What stopping takes beyond draining; Serve kills what takes longer."""

api = FastAPI(title="kvcommons", description="The OpenAI API over replicas that share one cache")


@api.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> Response:
    return JSONResponse(openai_api.invalid(error.errors()), 400)


@api.exception_handler(Exception)  # the server logs it, and raises it further
@api.exception_handler(KvcommonsError)
async def _failed(_: Request, error: Exception) -> Response:
    status, body = openai_api.failure(error)
    return JSONResponse(body, status)


@serve.deployment(name="Driver", ray_actor_options={"num_cpus": 0})
class Driver:
    """Owns the cluster: starts it before the endpoint opens, stops it with the application."""

    async def __init__(self, config: ClusterConfig, model: ModelSource) -> None:  # type: ignore[misc]
        self._cluster = await asyncio.to_thread(Cluster.start, config, model)

    async def ready(self) -> None:
        """Returns when the cluster has started."""

    def check_health(self) -> None:
        """Serve restarts this, and with it the cluster, when dead replicas go unnoticed."""
        if not self._cluster.is_watched():
            raise RuntimeError("the watcher of the replicas has ended")

    async def __del__(self) -> None:
        cluster = getattr(self, "_cluster", None)
        if cluster is not None:
            await asyncio.to_thread(cluster.stop)


@serve.deployment(name="Ingress", ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Ingress:
    """Takes OpenAI's requests, makes tokens of them, streams the answers."""

    async def __init__(  # type: ignore[misc]
        self, config: ClusterConfig, model: ModelSource, driver: DeploymentHandle
    ) -> None:
        self._default_max_tokens = config.serve.default_max_tokens
        self._model = model.name
        self._created = int(time.time())
        await driver.ready.remote()  # the actors are there from now on
        self._encoder = await asyncio.to_thread(PromptEncoder, model.path)
        self._router = RayRouterClient(config.router_name)
        self._dispatcher = connect(config, RayMetrics())

    @api.get("/health")
    async def health(self) -> Response:
        """200 when at least one replica takes requests, else 503."""
        try:
            snapshot = await self._router.snapshot()
        except ReplicaUnavailableError as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        alive = {one.replica_id: one.alive for one in snapshot.replicas}
        is_up = any(alive.values())
        body = {"status": "ok" if is_up else "unavailable", "replicas": alive}
        return JSONResponse(body, 200 if is_up else 503)

    @api.get("/v1/models")
    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse(openai_api.models(self._model, self._created))

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        """That model, or 404."""
        if name != self._model:
            return JSONResponse(openai_api.unknown_model(name, self._model), 404)
        return JSONResponse(openai_api.model(name, self._created))

    @api.post("/v1/completions")
    async def completions(self, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        if body.model != self._model:
            return JSONResponse(openai_api.unknown_model(body.model, self._model), 404)
        sampling = body.sampling(body.max_tokens or COMPLETION_MAX_TOKENS)
        prompts = [await self._tokens(prompt) for prompt in body.prompts]
        chunks = self._chunks(prompts, sampling, body.scope)
        reply = Reply.new("cmpl", self._model)
        if not body.stream:
            return JSONResponse(reply.completion(await collect(chunks, len(prompts))))
        usage = reply.completion_usage if body.includes_usage else None
        return await event_stream(chunks, len(prompts), [], reply.completion_chunk, usage)

    @api.post("/v1/chat/completions")
    async def chat(self, body: ChatRequest) -> Response:
        """Answer a conversation."""
        if body.model != self._model:
            return JSONResponse(openai_api.unknown_model(body.model, self._model), 404)
        messages = [message.for_template() for message in body.messages]
        prompt = await asyncio.to_thread(self._encoder.chat, messages)
        sampling = body.sampling(body.limit or self._default_max_tokens)
        chunks = self._chunks([prompt], sampling, body.scope)
        reply = Reply.new("chatcmpl", self._model)
        if not body.stream:
            return JSONResponse(reply.chat(*await collect(chunks, 1)))
        usage = reply.chat_usage if body.includes_usage else None
        return await event_stream(chunks, 1, [reply.chat_start()], reply.chat_chunk, usage)

    async def _tokens(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._encoder.text, prompt)
        return tuple(prompt)

    def _chunks(
        self, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, scope: ReuseScope
    ) -> Chunks:
        requests = [
            GenerationRequest(uuid.uuid4().hex, prompt, sampling, scope) for prompt in prompts
        ]
        return merge([self._dispatcher.generate(request) for request in requests])


def build(args: dict[str, str]) -> Application:
    """The application for `serve run`; `args` is `{"config": PATH}`.

    The model is resolved here, once, where a person sees the progress and the errors.
    """
    from cluster.models import resolve_model

    if set(args) != {"config"}:
        raise ConfigError(
            f"cluster.app:build takes one argument, config=PATH (given: {sorted(args) or 'none'}); "
            "for example config=configs/cpu.yaml"
        )
    config = load_config(args["config"])
    return application(config, resolve_model(config.model))


def application(config: ClusterConfig, model: ModelSource) -> Application:
    """The application for a configuration and a model that are at hand."""
    drain_s = config.lifecycle.drain_timeout_s
    driver: Any = Driver  # the decorators of Serve have no types
    ingress: Any = Ingress
    return ingress.options(
        num_replicas=config.serve.num_ingress,
        max_ongoing_requests=config.serve.max_ongoing_requests,
        max_queued_requests=config.serve.max_queued_requests,
        graceful_shutdown_timeout_s=drain_s,
    ).bind(
        config,
        model,
        driver.options(graceful_shutdown_timeout_s=drain_s + STOP_MARGIN_S).bind(config, model),
    )
