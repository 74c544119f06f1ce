"""The Serve application: the OpenAI API in front of one cluster.

    serve run cluster.app:build config=configs/cpu.yaml

`Driver` owns the cluster, so deleting the application ends every actor of it. `Ingress` holds no
state worth keeping: Serve runs as many as the load wants, and each finds the actors by name.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.config import ModelSource, ReplicaConfig
from actors.engine import Engine
from cluster.clients import RayRouterClient, connect
from cluster.config import ClusterConfig, ServeConfig, load_config
from cluster.driver import Cluster
from cluster.endpoint.access import Access
from cluster.endpoint.api import create_api
from cluster.endpoint.keys import KeysDocument, KeysFile, read_keys, with_quotas
from cluster.endpoint.prompts import PromptEncoder
from cluster.endpoint.service import Endpoint
from cluster.ray_metrics import RayMetrics
from shared_cache.errors import ConfigError

logger = logging.getLogger(__name__)

BuildEngine = Callable[[ReplicaConfig], Engine]

STOP_MARGIN_S = 15.0
"""What stopping takes beyond draining; Serve kills what takes longer."""

SPARE_PLACES = 64
"""Requests that Serve lets into an ingress beyond those that it serves, to be told no by it."""

NEWS_PERIOD_S = 1.0
INGRESS_SILENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class News:
    """What an ingress is told now and then; `keys` only where it has another version of them."""

    num_ingress: int
    keys_version: str
    keys: KeysDocument | None


@serve.deployment(name="Driver", ray_actor_options={"num_cpus": 0})
class Driver:
    """Owns the cluster: starts it before the endpoint opens, stops it with the application."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ClusterConfig,
        model: ModelSource,
        keys: KeysDocument | None,
        build: BuildEngine | None,
    ) -> None:
        self._keys = KeysFile(config.serve.keys_file, keys)
        self._ingresses: dict[str, float] = {}
        self._cluster = await asyncio.to_thread(Cluster.start, config, model, build)

    async def ready(self) -> int:
        """The longest prompt plus output that every replica can serve, once all have started."""
        return self._cluster.max_total_tokens

    async def news(self, ingress_id: str, keys_version: str) -> News:
        """What is new for an ingress, which shows by asking that it is there."""
        now_s = time.monotonic()
        self._ingresses[ingress_id] = now_s
        self._ingresses = {
            one: seen_s
            for one, seen_s in self._ingresses.items()
            if seen_s > now_s - INGRESS_SILENCE_S
        }
        await asyncio.to_thread(self._keys.refresh)
        version = self._keys.version
        keys = None if keys_version == version else self._keys.document
        return News(len(self._ingresses), version, keys)

    async def reason_not_shared(self) -> str | None:
        """See `Cluster.reason_not_shared`."""
        return self._cluster.reason_not_shared()

    def check_health(self) -> None:
        """Serve restarts this, and with it the cluster, when dead replicas go unnoticed."""
        if not self._cluster.is_watched():
            raise RuntimeError("the watcher of the replicas has ended")

    async def __del__(self) -> None:
        cluster = getattr(self, "_cluster", None)
        if cluster is not None:
            await asyncio.to_thread(cluster.stop)


@serve.deployment(name="Ingress", ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Ingress:
    """Takes OpenAI's requests, makes tokens of them, streams the answers."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ClusterConfig,
        model: ModelSource,
        keys: KeysDocument | None,
        driver: DeploymentHandle,
    ) -> None:
        max_total_tokens = await driver.ready.remote()  # the actors are there from now on
        self._endpoint = Endpoint(
            model=model.name,
            config=config.serve,
            encoder=await asyncio.to_thread(PromptEncoder, model.path),
            dispatcher=connect(config, RayMetrics()),
            router=RayRouterClient(config.router_name),
            access=Access(keys),
            driver=driver,
            max_total_tokens=max_total_tokens,
            metrics_url=_metrics_url(),
        )
        self._endpoint.readiness.append(self._reason_not_shared)
        news = NewsReader(self._endpoint)
        await news.read()  # `keys` are those of the deployment: some may be revoked since
        self._news = asyncio.create_task(news.follow())

    async def _reason_not_shared(self) -> str | None:
        """Why canaries say that the replicas do not share, until they have once."""
        try:
            reason: str | None = await self._endpoint.driver.reason_not_shared.remote()
        except RayError as error:
            return f"the driver does not answer: {type(error).__name__}"
        return reason

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve calls with each request."""
        return create_api(self._endpoint)


class NewsReader:
    """Keeps keys and shares of limits of one ingress as the driver tells them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._ingress_id = uuid.uuid4().hex
        self._keys_version = ""

    async def read(self) -> None:
        """Ask the driver once; raises `RayError` when it does not answer."""
        access = self._endpoint.access
        news: News = await self._endpoint.driver.news.remote(self._ingress_id, self._keys_version)
        access.share_with(news.num_ingress)
        if news.keys_version != self._keys_version:
            access.update(news.keys)
            self._keys_version = news.keys_version

    async def follow(self) -> None:
        """Ask again and again, whatever fails meanwhile."""
        while True:
            await asyncio.sleep(NEWS_PERIOD_S)
            try:
                await self.read()
            except RayError as error:
                logger.info("no news from the driver: %s", type(error).__name__)
            except Exception:
                logger.exception("following the driver's news failed; trying again")


def _metrics_url() -> str | None:
    """Ray's metrics port on this machine."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None


def build(args: dict[str, str]) -> Application:
    """The application for `serve run` and `serve deploy`; `args` is `{"config": PATH}`.

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


def application(
    config: ClusterConfig, model: ModelSource, build: BuildEngine | None = None
) -> Application:
    """The application for a configuration and a model that are at hand.

    `build` replaces the engine (for tests and measurements).
    """
    drain_s = config.lifecycle.drain_timeout_s
    keys = read_keys(config.serve.keys_file, config.serve.keys_environment)
    config = with_quotas(config, keys)
    driver: Any = Driver  # the decorators of Serve have no types
    ingress: Any = Ingress
    return ingress.options(
        **_ingress_options(config.serve), graceful_shutdown_timeout_s=drain_s
    ).bind(
        config,
        model,
        keys,
        driver.options(graceful_shutdown_timeout_s=drain_s + STOP_MARGIN_S).bind(
            config, model, keys, build
        ),
    )


def _ingress_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's limits: wide enough that an ingress itself says no, and when to come again."""
    scale = config.ingress
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_places + SPARE_PLACES,
        "max_queued_requests": config.max_queued_requests,
    }
    if scale.min == scale.max:
        return {**options, "num_replicas": scale.min}
    autoscaling = {
        "min_replicas": scale.min,
        "max_replicas": scale.max,
        "target_ongoing_requests": scale.target_requests,
    }
    return {**options, "autoscaling_config": autoscaling}
