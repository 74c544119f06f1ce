"""The benchmarks on a few small blocks: they run, compare fairly, and name what the issue names."""

import argparse

import pytest

from benchmarks import store as benchmark
from benchmarks.arena_soak import Client
from benchmarks.cases.arena import Arena, namespace
from benchmarks.cases.comparisons import Found
from benchmarks.cases.disk import ColdStore, DirectFile, Store, has_direct_io, store_in
from benchmarks.cases.rounds import BLOCK_SIZES, Memcpy, Method, Payload, compare, new_names
from benchmarks.gpu import link
from shared_cache.config import CacheConfig
from shared_cache.namespace import BlockLayout, Namespace
from shared_cache.opening import open_cache

LAYOUT = BlockLayout(2, 2, 1, 32, 32, "bfloat16")
SPACE = Namespace("tiny", "0", "test", LAYOUT)
NUM_BLOCKS = 80


@pytest.fixture(name="payload")
def make_payload():
    return Payload(LAYOUT.block_bytes, NUM_BLOCKS)


@pytest.fixture(name="cache")
def make_cache():
    num_bytes = 3 * NUM_BLOCKS * LAYOUT.block_bytes
    config = CacheConfig.model_validate({"host": {"bytes": num_bytes, "scope": "process"}})
    cache = open_cache(config, SPACE)
    yield cache
    cache.close()


class Noted(Method):
    """Takes as long as it is told and notes when it is called."""

    def __init__(self, name, calls, put_s, get_s):
        super().__init__(name, None)
        self.calls, self.times = calls, (put_s, get_s)

    def put(self):
        self.calls.append(f"put {self.name}")
        return self.times[0]

    def get(self):
        self.calls.append(f"get {self.name}")
        return self.times[1]


def test_methods_take_turns_in_changing_order_and_medians_are_compared():
    calls = []
    slow, fast = Noted("slow", calls, 4.0, 9.0), Noted("fast", calls, 2.0, 3.0)
    done = compare([slow, fast], num_bytes=10**9, num_rounds=3)
    assert done.put_ratio("fast", "slow") == 2
    assert done.get_ratio("fast", "slow") == 3
    assert done.get_ratio("fast", "not there") is None
    assert done.gb_per_s()["slow"]["put"] == pytest.approx(0.25)
    firsts = calls[::4]
    assert len(calls) == 16  # two methods, a put and a get each, in four rounds
    assert {"put slow", "put fast"} == set(firsts)


def test_all_ways_of_ours_bring_the_same_bytes_back(payload, cache, tmp_path):
    opened = store_in(tmp_path / "store", SPACE)
    methods = [
        Memcpy(payload),
        Arena("arena", cache, payload),
        Store("store", opened, payload),
        ColdStore("cold", opened, payload, tmp_path / "store"),
    ]
    if has_direct_io(tmp_path):
        methods.append(DirectFile(tmp_path, payload))
    done = compare(methods, payload.num_bytes, num_rounds=2)
    assert set(done.gb_per_s()) == {method.name for method in methods}
    for method in methods[2:4]:
        method.close()


def test_a_wrong_byte_is_found(payload):
    class Liar(Memcpy):
        def _get(self):
            super()._get()
            self.payload.pool[3][100] ^= 1

    with pytest.raises(RuntimeError):
        compare([Liar(payload)], payload.num_bytes, num_rounds=1)


def test_block_sizes_are_those_of_their_namespaces():
    for name, block_bytes in BLOCK_SIZES.items():
        assert namespace(name).layout.block_bytes == block_bytes


def test_the_report_has_the_issues_keys_and_says_what_was_missed():
    report = benchmark.Report()
    report.add("host", "4MiB", Found({"get_vs_memcpy": 0.95, "put_vs_memcpy": 0.1}, {}))
    report.add("disk", "4MiB", Found({"put_vs_torch_save": None}, {}, ["no disk"]))
    report.add("s3", "1.25MiB", Found({"get_vs_s3fs": 2.0}, {"store": {}}, ["no disk"]))
    report.figures.update(stage_512_ms=9.0, match_us_per_block=0.5, stage_calls_per_s=1e4)
    args = argparse.Namespace(quick=True, only=("host",), folder=".")
    found = report.as_json(args)
    assert found["host"]["4MiB"]["get_vs_memcpy"] == 0.95
    assert found["s3"] == {"get_vs_s3fs": 2.0}
    assert found["stage_calls_per_s"] == 1e4
    assert found["notes"] == ["no disk"]
    missed = ["host 4MiB put_vs_memcpy", "disk 4MiB put_vs_torch_save", "stage_512_ms"]
    assert found["missed"] == missed


def test_the_soak_counts_right_bytes_and_notices_wrong_ones(cache, monkeypatch):
    monkeypatch.setattr("benchmarks.arena_soak.NUM_PROMPTS", 6)
    client = Client(cache.host, seed=1)
    client.play(0.2)
    counts = client.counts
    assert counts.requests > 1
    assert counts.loaded_blocks > 0
    assert counts.saved_blocks > 0
    assert (counts.lost_leases, counts.wrong_blocks) == (0, 0)
    assert cache.host.stats().leased_slots == 0
    assert cache.host.stats().evicted_blocks > 0
    for name in ("prompt 0", "prompt 1", "prompt 2", "prompt 3", "prompt 4", "prompt 5"):
        spoil(cache.host, name)
    client.play(0.1)
    assert client.counts.wrong_blocks > 0


def spoil(host, label):
    """Flip a bit of the first block of a prompt, if it is here."""
    lease = host.lease(new_names(label, 1))
    for slot in lease.slots:
        host.buffer(slot)[0] ^= 1
    host.release(lease)


def test_the_gpu_benchmark_of_the_link_runs_dry_on_a_cpu():
    found = link.measure(num_blocks=6, num_rounds=1, device="cpu")
    assert set(found["gb_per_s"]) == {"link_save", "save", "link_load", "load"}
    assert all(speed > 0 for speed in found["gb_per_s"].values())
