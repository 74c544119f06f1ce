"""Metrics: what snapshots become, the files made from the table, and a real Prometheus."""

import asyncio
import importlib.util
import itertools
import json
import re
import shutil
import socket
import subprocess
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml

from actors.engine import EngineStats, GenerationRequest, KvCacheStats, SamplingParams
from actors.replica_health import ReplicaHealth, ReplicaStats
from cluster import cli
from cluster.config import ClusterConfig, ServeConfig
from cluster.dashboard import dashboard
from cluster.dashboard_files import FOLDER_VARIABLE, install_dashboard
from cluster.dashboard_panels import panels
from cluster.driver import Cluster
from cluster.endpoint.access import Access
from cluster.endpoint.api import create_api
from cluster.endpoint.service import Endpoint
from cluster.figures import figure, replica_figures, tier_name
from cluster.metric_table import METRICS
from cluster.ray_metrics import FigureExporter, RayMetrics
from shared_cache.cache_stats import CacheStats
from shared_cache.cost import GateStats
from shared_cache.host.interface import HostStats
from shared_cache.tiers import TierStats
from tests.tiny_model import make_tiny_model, tiny_source

ROOT = Path(__file__).parents[2]
PROMETHEUS = shutil.which("prometheus")
PATIENCE_S = 150.0
BLOCK = 8
NUM_DOCUMENTS = 14


def snapshot(**cache) -> ReplicaStats:
    kv = KvCacheStats(10, 4, 6, 4, 0, 0, 0, 0)
    engine = EngineStats(kv, 2, 3, 0, 0, 0, 0, 0)
    gate = GateStats(1, 2, 3, 0, 0, None, 0.25, None, {})
    tier = TierStats("s3://me:secret@host/b", read_bytes=100, read_s=0.5, corrupt_objects=7)
    stats = CacheStats(HostStats(8, 5, 2, 1, 2, 9, 64), 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0)
    stats = replace(stats, **({"tiers": (tier,), "gate": gate} | cache))
    return ReplicaStats(ReplicaHealth("a", "boot", 1, "ready"), 1.0, 6, engine, stats)


def test_a_snapshot_tells_every_kind_with_its_zero():
    told = {(one.name, one.tags): one.value for one in replica_figures("a", snapshot())}
    assert told[("replica_up", (("replica", "a"),))] == 1
    queue = {tags[1][1]: v for (name, tags), v in told.items() if name == "queued_requests"}
    assert queue == {"staging": 1, "waiting": 2, "running": 3}
    faults = {tags[2][1]: v for (name, tags), v in told.items() if name == "faults"}
    assert faults == {"error": 0, "corrupt": 7, "foreign": 0, "vanished": 0, "retry": 0}
    assert {tags[1][1] for (_, tags) in told if len(tags) == 3} == {"s3://host/b"}, "no password"
    assert all(METRICS[name].tags == tuple(dict(tags)) for name, tags in told)


def test_a_replica_that_is_away_tells_only_that():
    assert list(replica_figures("a", None)) == [figure("replica_up", 0, replica="a")]


def test_names_of_tiers_hold_no_secrets():
    assert tier_name("s3://key:secret@bucket/x@y") == "s3://bucket/x@y"
    assert tier_name("file:///a/b") == "file:///a/b"


class Recorder:
    """Stands for a counter or gauge of Ray."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def inc(self, value, tags):
        assert value > 0, "Ray refuses zero"
        self.calls.append(value)

    def set(self, value, tags):
        self.calls.append(value)


def exporter(monkeypatch) -> tuple[FigureExporter, Recorder]:
    recorder = Recorder()
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(f"cluster.ray_metrics.{kind}", lambda *_: recorder)
    return FigureExporter(), recorder


def test_counters_begin_at_zero_and_grow_by_what_came(monkeypatch):
    exports, counter = exporter(monkeypatch)
    for total in (0, 5, 5, 7, 3):  # 3: the replica is a new process
        exports.export([figure("saved_blocks", total, replica="a")])
    first, *others = counter.calls
    assert 0 < first < 1e-300
    assert others == [5, 2, 3]
    assert sum(counter.calls) == 10


def test_a_gauge_that_nobody_tells_any_more_is_zero(monkeypatch):
    exports, gauge = exporter(monkeypatch)
    exports.export([figure("leased_blocks", 4, replica="a")])
    exports.export([])
    exports.export([])
    assert gauge.calls == [4, 0]


def test_every_metric_has_a_panel_and_every_panel_asks_for_metrics_only():
    text = " ".join(query.expression for panel in panels() for query in panel.queries)
    asked = set(re.findall(r"ray_kvcommons_\w+", text))
    known = {one.exported + "_bucket" * (one.kind == "histogram") for one in METRICS.values()}
    assert asked == known


def test_dashboard_and_page_are_those_of_the_table():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "docs/make_dashboard.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    advice = "run `python docs/make_dashboard.py`"
    assert maker.DASHBOARD.read_text(encoding="utf-8") == maker.dashboard_text(), advice
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), advice


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for one in places
        for x in range(one["x"], one["x"] + one["w"])
        for y in range(one["y"], one["y"] + one["h"])
    ]
    assert len(cells) == len(set(cells))


def test_the_prometheus_configuration_reads_ray_s_list_of_machines():
    config = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    files = job["file_sd_configs"][0]["files"]
    assert files == ["/tmp/ray/prom_metrics_service_discovery.json"]


@pytest.fixture(scope="module")
def cluster(ray_session, tmp_path_factory):
    """A pool and an arena that are too small for the traffic, so that every tier has to work."""
    folder = tmp_path_factory.mktemp("metrics")
    model = tiny_source(make_tiny_model(folder / "model"))
    kv = {"tokens_per_block": BLOCK, "max_tokens": 1024}
    config = ClusterConfig(
        name="metrics",
        model="tiny",
        num_cpus_per_replica=0.5,
        engine={"torch_threads": 1, "kv_cache_config": kv},
        cache={
            "store": str(folder / "store"),
            "host": {"bytes": "4MiB"},
            "cost": {"gate": False},  # computing is faster than any store, with this model
        },
        router={"policy": "round_robin"},
        lifecycle={"metrics_period_s": 0.5},
    )
    with Cluster.start(config, model) as cluster:
        yield cluster


class Prometheus:
    """A real one that scrapes one port every second."""

    def __init__(self, folder: Path, target_port: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        target = {"targets": [f"127.0.0.1:{target_port}"]}
        config["scrape_configs"] = [{"job_name": "ray", "static_configs": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            PROMETHEUS,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def values(self, expression: str) -> list[float]:
        """The numbers that a query gives now."""
        for variable, value in (("$__rate_interval", "15s"), ("$replica", ".*")):
            expression = expression.replace(variable, value)
        try:
            answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression})
        except httpx.TransportError:  # it is starting
            return []
        if answer.status_code == 503:  # it is still starting, and says so in plain words
            return []
        data = answer.json()
        assert data["status"] == "success", (expression, data)
        numbers = [float(one["value"][1]) for one in data["data"]["result"]]
        return [number for number in numbers if number == number]  # not NaN

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def prometheus(ray_session, metrics_port, tmp_path):
    if PROMETHEUS is None:
        pytest.skip("no `prometheus` on this machine: apt-get install prometheus")
    server = Prometheus(tmp_path, metrics_port)
    yield server
    server.stop()


async def answer(dispatcher, prompt: tuple[int, ...], name: str) -> int:
    request = GenerationRequest(name, prompt, SamplingParams(4, ignore_eos=True))
    async with aclosing(dispatcher.generate(request)) as stream:
        return sum([len(routed.chunk.token_ids) async for routed in stream])


def document(number: int) -> tuple[int, ...]:
    return tuple((number * 7 + index * (number + 3)) % 250 + 3 for index in range(800))


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_dashboard_is_put_beside_ray_s_own(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))
    assert install_dashboard() is None
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert json.loads(install_dashboard().read_text()) == dashboard()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_canaries_pass_through_a_real_cluster_and_the_command_says_so(cluster, tmp_path, capsys):
    deadline_s = time.monotonic() + PATIENCE_S
    while (reason := cluster.reason_not_shared()) is not None:
        assert time.monotonic() < deadline_s, reason
        time.sleep(0.1)
    assert [one.finding.state for one in cluster.canaries().pairs] == ["ok", "ok"]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster.config.model_dump(mode="json", exclude_defaults=True)))
    assert cli.main(["doctor", "--config", str(path)]) == 0
    told = capsys.readouterr().out
    assert "metrics-replica-0 -> metrics-replica-1: loaded 24 tokens" in " ".join(told.split())
    path.write_text(path.read_text().replace("name: metrics", "name: nobody"))
    assert cli.main(["doctor", "--config", str(path), "--json"]) == 1
    assert "no cluster 'nobody' runs" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.timeout(400)
async def test_every_panel_s_query_returns_data(cluster, prometheus):
    dispatcher = cluster.dispatcher(RayMetrics())
    api = create_api(Endpoint("tiny", ServeConfig(), None, dispatcher, None, Access(None)))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://kvcommons")
    missing = {query.expression for panel in panels() for query in panel.queries}
    deadline_s = time.monotonic() + PATIENCE_S
    for turn in itertools.count():
        assert await answer(dispatcher, document(turn % NUM_DOCUMENTS), f"r{turn}") == 4
        assert (await http.get("/v1/models")).status_code == 200
        missing = {one for one in missing if not prometheus.values(one)}
        if not missing and turn >= 2 * NUM_DOCUMENTS:
            break
        assert time.monotonic() < deadline_s, (missing, cluster.stats())
        await asyncio.sleep(0.05)
    answered = 'ray_kvcommons_http_responses_total{route="/v1/models", status="200"}'
    assert 0 < sum(prometheus.values(answered)) <= turn + 1
    await http.aclose()
    (evicted,) = {int(v) for v in prometheus.values("max(ray_kvcommons_evicted_blocks_total)")}
    ready = prometheus.values('ray_kvcommons_replicas{count="ready"}')
    assert (ready, evicted > 0) == ([2.0], True)
    assert min(prometheus.values("ray_kvcommons_faults_total")) < 1e-300, "zeros are told"
    computed = sum(prometheus.values('ray_kvcommons_prompt_tokens_total{tier="computed"}'))
    assert 0 < computed <= 800 * (turn + 1)
