"""What `kvcommons status` shows: faults beside the hit rate, and TensorRT-LLM's names."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from actors.engine import EngineStats, KvCacheStats
from actors.replica_health import ReplicaHealth, ReplicaStats
from actors.router import Router, RouterConfig
from actors.router_messages import ReplicaInfo
from cluster import cli
from cluster.status import as_data, as_table
from shared_cache.cache_stats import CacheStats
from shared_cache.host.interface import HostStats

NAMES = ("kvcommons-replica-0", "kvcommons-replica-1")
ENGINE = EngineStats(KvCacheStats(384, 300, 84, 32, 90, 90, 30, 10), 0, 1, 2000, 123456, 0, 0, 99)


def numbers(kind: type, **given):
    """An instance of a statistics class whose other figures are 0."""
    return kind(**{name: given.get(name, 0) for name in kind.__dataclass_fields__})


CACHE = numbers(CacheStats, host=numbers(HostStats), dropped_saves=71, store_faults=83)
READY = ReplicaStats(ReplicaHealth(NAMES[0], "b", 4194304, "ready"), 5.0, 3, ENGINE, CACHE)


@pytest.fixture
def snapshot():
    router = Router(RouterConfig(), 32, shares=True)
    for name in NAMES:
        router.register(ReplicaInfo(name, "b"))
    return router.snapshot()


def shown(snapshot, stats) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(as_table(snapshot, stats))
    return captured.get()


def test_the_table_shows_faults_and_fits_a_terminal(snapshot):
    text = shown(snapshot, {NAMES[0]: READY, NAMES[1]: None})
    row = next(line for line in text.splitlines() if NAMES[0] in line)
    assert row.split()[1:] == ["ready", "4194304", "3", "0", "75%", "123456", "71", "83"]
    away = next(line for line in text.splitlines() if NAMES[1] in line)
    assert away.split()[1:] == ["away", "-", "-", "0", "-", "-", "-", "-"]


def test_a_replica_that_is_routed_to_by_load_alone_is_seen_to_be(snapshot):
    accuracy = replace(snapshot.replicas[0].accuracy, is_load_only=True)
    beliefs = (replace(snapshot.replicas[0], accuracy=accuracy), snapshot.replicas[1])
    demoted = replace(snapshot, replicas=beliefs)
    lines = shown(demoted, {NAMES[0]: READY, NAMES[1]: None}).splitlines()
    row = next(number for number, line in enumerate(lines) if NAMES[0] in line)
    assert lines[row + 1].strip() == "by load"
    data = as_data(demoted, {NAMES[0]: READY, NAMES[1]: None})["replicas"]
    assert data[NAMES[0]]["router"]["accuracy"]["is_load_only"] is True


def test_a_replica_without_a_cache_or_an_engine_has_no_figures(snapshot):
    alone = replace(READY, cache=None)
    starting = replace(alone, engine=None)
    text = shown(snapshot, {NAMES[0]: alone, NAMES[1]: starting})
    rows = [line.split() for line in text.splitlines() if "kvcommons-replica" in line]
    assert [row[-4:] for row in rows] == [["75%", "123456", "-", "-"], ["-"] * 4]
    data = as_data(snapshot, {NAMES[0]: alone, NAMES[1]: starting})["replicas"]
    assert (data[NAMES[0]]["cache"], data[NAMES[1]]["kvCacheStats"]) == (None, None)


def test_json_has_tensorrt_llms_names_for_each_replica(snapshot):
    data = as_data(snapshot, {NAMES[0]: READY, NAMES[1]: None})
    data = json.loads(json.dumps(data))
    mine = data["replicas"][NAMES[0]]
    assert mine["kvCacheStats"] == ENGINE.kv_cache.as_dict()
    assert mine["engine"]["generated_tokens"] == 123456
    assert "kv_cache" not in mine["engine"]
    assert (mine["cache"]["dropped_saves"], mine["cache"]["store_faults"]) == (71, 83)
    assert (mine["state"], mine["router"]["num_routed"]) == ("ready", 0)
    away = data["replicas"][NAMES[1]]
    assert (away["state"], away["kvCacheStats"]) == ("away", None)
    assert set(away) == set(mine)
    assert data["router"]["num_reservations"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], {"as_json": False}), (["--json"], {"as_json": True})]
)
def test_only_status_takes_json(monkeypatch, arguments, expected):
    asked = []

    def note(config, **options):
        asked.append(options)
        return 0

    for name, (_, text) in cli._COMMANDS.items():
        monkeypatch.setitem(cli._COMMANDS, name, (note, text))
    assert cli.main(["status", *arguments]) == 0
    assert cli.main(["down"]) == 0
    assert asked == [expected, {}]
    with pytest.raises(SystemExit):
        cli.main(["down", "--json"])
