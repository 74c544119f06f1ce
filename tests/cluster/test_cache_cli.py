"""`kvcommons cache` from end to end, on real stores."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import cache_bench, cache_warm
from cluster.cache_target import show
from cluster.cli import main
from cluster.units import parse_bytes, parse_duration_s, show_age
from shared_cache.config import HostConfig
from shared_cache.errors import ConfigError
from shared_cache.host.local import LocalHostTier
from shared_cache.host.node import open_node_tier
from shared_cache.namespace import FORMAT_VERSION
from shared_cache.stores.fs_store import FsBlockStore, open_store
from shared_cache.upkeep.whole_store import WholeStore
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, chain_of, payload_of, run_of

OTHER = replace(NAMESPACE, model="other")
CHAINS = [chain_of(3 + i, first_token=1000 * i) for i in range(4)]
NUM_BLOCKS = sum(len(chain.hashes) for chain in CHAINS)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"memory:///{uuid.uuid4().hex}"


@pytest.fixture
def store(url: str) -> FsBlockStore:
    """Four chains in one namespace, and one in another."""
    store = open_store(url, NAMESPACE)
    for chain in CHAINS:
        store.write(run_of(chain))
    open_store(url, OTHER).write(run_of(CHAINS[0]))
    return store


def cache(command: str, url: str, *arguments: str) -> int:
    return main(["cache", command, "--store", url, *arguments])


def data_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    status = cache(*arguments, "--json")
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return json.loads(out)


def said(capsys: pytest.CaptureFixture[str], status: int, arguments: Sequence[str]) -> str:
    """The one line that a failing command says."""
    capsys.readouterr()
    assert main(["cache", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@contextmanager
def owner_of(config: HostConfig) -> Iterator[HostConfig]:
    """An owner of that arena in a process of its own; the configuration to join it with."""
    command = [sys.executable, "-m", "shared_cache.host", f"--bytes={int(config.bytes)}"]
    where = [f"--name={config.name}", f"--folder={config.folder}"]
    joining = config.model_copy(update={"start_owner": False})
    with subprocess.Popen([*command, *where], stderr=subprocess.DEVNULL) as owner:
        try:
            open_node_tier(joining, NAMESPACE.fingerprint, BLOCK_BYTES).close()  # waits for it
            yield joining
        finally:
            owner.terminate()


class TestLooking:
    def test_ls_shows_every_namespace(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cache("ls", store.url) == 0
        lines = capsys.readouterr().out.splitlines()
        mine = next(line for line in lines if NAMESPACE.fingerprint[:12] in line)
        assert mine.split()[1:5] == ["m", "fake", "float32", str(NUM_BLOCKS)]
        assert any(OTHER.fingerprint[:12] in line and " other " in line for line in lines)

    def test_ls_json_tells_all_of_a_namespace(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = {one["fingerprint"]: one for one in data_of(capsys, "ls", store.url)}
        mine = data[NAMESPACE.fingerprint]
        assert mine["namespace"]["layout"]["dtype"] == "float32"
        assert (mine["num_objects"], mine["num_blocks"]) == (4, NUM_BLOCKS)
        assert mine["num_bytes"] == sum(run.num_bytes for run in store.entries())

    def test_ls_of_a_namespace_shows_its_runs(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        digits = NAMESPACE.fingerprint[:8]
        assert cache("ls", store.url, "--namespace", digits) == 0
        out = capsys.readouterr().out
        assert all(chain.hashes[0].hex()[:16] in out for chain in CHAINS)
        runs = data_of(capsys, "ls", store.url, "--namespace", digits)
        told = {run["hashes"][0]: run["hashes"] for run in runs}
        assert told == {c.hashes[0].hex(): [h.hex() for h in c.hashes] for c in CHAINS}

    def test_what_a_newer_version_wrote_is_shown_and_left_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url = f"file://{tmp_path}"
        folder = tmp_path / f"v{FORMAT_VERSION + 1}" / ("ab" * 16)
        path = folder / "cd" / f"{'cd' * 32}.arrow"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(2048))
        assert cache("ls", url) == 0
        assert "not readable" in capsys.readouterr().out
        assert cache("gc", url, "--max-bytes", "1KiB") == 0
        assert path.exists()
        assert "cannot read what is stored" in said(capsys, 2, ["verify", "--store", url])

    def test_stat_tells_waste(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chain = CHAINS[3]
        open_store(store.url, NAMESPACE).write(run_of(chain).tail(2))
        found = data_of(capsys, "stat", store.url)[NAMESPACE.fingerprint]
        assert (found["num_runs"], found["num_duplicates"], found["num_unrooted"]) == (5, 4, 0)
        assert cache("stat", store.url, "--namespace", NAMESPACE.fingerprint) == 0
        out = capsys.readouterr().out
        assert "blocks stored once more than needed" in out
        assert "runs of 5-8 blocks" in out

    def test_looking_makes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for command in ("ls", "stat", "verify"):
            text = said(capsys, 2, [command, "--store", f"{tmp_path}/nowhere"])
            assert "nothing is stored in" in text
        assert not (tmp_path / "nowhere").exists()

    def test_looking_is_no_use(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Who only looks must not keep a block from being deleted."""
        store = open_store(f"file://{tmp_path}", NAMESPACE)
        store.write(run_of(CHAINS[0]))
        (run,) = store.entries()
        path = f"{WholeStore(store.url).local_folder(NAMESPACE)}/{run.name}"
        then_s = time.time() - 5000.0
        os.utime(path, (then_s, then_s))
        for command in ("ls", "stat", "verify"):
            assert cache(command, store.url) == 0
        (after,) = open_store(store.url, NAMESPACE).entries()
        assert after.used_s == pytest.approx(then_s, abs=1)


class TestVerify:
    @pytest.fixture
    def store(self, tmp_path: Path) -> FsBlockStore:
        store = open_store(f"file://{tmp_path}/store", NAMESPACE)
        for chain in CHAINS:
            store.write(run_of(chain))
        return store

    def path(self, store: FsBlockStore, index: int) -> Path:
        first = CHAINS[index].hashes[0].hex()
        folder = WholeStore(store.url).local_folder(NAMESPACE)
        return Path(f"{folder}/{first[:2]}/{first}.arrow")

    def test_a_sound_store(self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]) -> None:
        assert cache("verify", store.url) == 0
        assert f"4 objects with {NUM_BLOCKS} blocks are good" in capsys.readouterr().out

    def test_damage_is_told_and_repaired(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flipped, cut, empty = (self.path(store, index) for index in range(3))
        data = bytearray(flipped.read_bytes())
        data[4096] ^= 1  # the first byte of the first block
        flipped.write_bytes(data)
        os.truncate(cut, 4096 + BLOCK_BYTES)  # after its first block
        empty.write_bytes(b"")
        assert cache("verify", store.url, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        bad = {one["name"].rpartition("/")[2] for one in found["bad"]}
        assert bad == {flipped.name, cut.name, empty.name}
        assert (found["is_good"], found["num_objects"]) == (False, 4)
        assert flipped.exists()
        assert cache("verify", store.url, "--repair") == 1
        assert "deleted" in capsys.readouterr().out
        assert not any(path.exists() for path in (flipped, cut, empty))
        assert cache("verify", store.url) == 0
        again = open_store(store.url, NAMESPACE)
        for chain in CHAINS:  # the names are free again
            again.write(run_of(chain))
        assert cache("verify", store.url) == 0
        assert f"4 objects with {NUM_BLOCKS} blocks" in capsys.readouterr().out


class TestGc:
    def test_a_budget(self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]) -> None:
        before = data_of(capsys, "ls", store.url)
        all_bytes = sum(one["num_bytes"] for one in before)
        limit = str(all_bytes // 2)
        plan = data_of(capsys, "gc", store.url, "--max-bytes", limit, "--dry-run")
        assert data_of(capsys, "ls", store.url) == before
        done = data_of(capsys, "gc", store.url, "--max-bytes", limit)
        assert done == {**plan, "is_dry_run": False}
        after = sum(one["num_bytes"] for one in data_of(capsys, "ls", store.url))
        assert after == done["left_bytes"] == all_bytes - done["num_bytes"] <= all_bytes // 2
        assert len(done["objects"]) == done["num_objects"]
        again = data_of(capsys, "gc", store.url, "--max-bytes", limit)
        assert again["num_objects"] == 0

    def test_an_age(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        store = open_store(f"file://{tmp_path}", NAMESPACE)
        for chain in CHAINS:
            store.write(run_of(chain))
        old = {CHAINS[1].hashes[0], CHAINS[2].hashes[0]}
        for run in store.entries():
            if run.hashes[0] in old:
                path = f"{WholeStore(store.url).local_folder(NAMESPACE)}/{run.name}"
                os.utime(path, (time.time() - 9 * 86400,) * 2)
        assert cache("gc", store.url, "--max-age", "7d") == 0
        assert "2 objects" in capsys.readouterr().out
        assert {run.hashes[0] for run in store.entries()} == {
            CHAINS[0].hashes[0],
            CHAINS[3].hashes[0],
        }

    def test_only_one_namespace(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        digits = OTHER.fingerprint[:12]
        assert cache("gc", store.url, "--max-bytes", "1", "--namespace", digits) == 0
        left = {one["fingerprint"]: one["num_objects"] for one in data_of(capsys, "ls", store.url)}
        assert left == {NAMESPACE.fingerprint: 4, OTHER.fingerprint: 0}


class TestWarm:
    def test_the_hottest_blocks_fill_what_is_free(self, store: FsBlockStore) -> None:
        host = LocalHostTier(8 * 4096, BLOCK_BYTES)
        warmed = cache_warm.fill(host, store, NAMESPACE, max_bytes=None, pin_s=60.0, is_shared=True)
        assert (warmed.num_blocks, warmed.num_wanted_blocks) == (8, 8)
        assert host.stats().used_slots == 8
        assert not host.reserve(1)  # pinned

    def test_no_more_than_wanted(self, store: FsBlockStore) -> None:
        host = LocalHostTier(64 * 4096, BLOCK_BYTES)
        warmed = cache_warm.fill(
            host, store, NAMESPACE, max_bytes=5 * BLOCK_BYTES, pin_s=0.0, is_shared=True
        )
        assert warmed.num_blocks == host.stats().used_slots == 5

    @pytest.mark.parametrize("is_pinned", [False, True])
    def test_a_running_arena_gets_the_blocks(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_pinned: bool
    ) -> None:
        store = open_store(f"file://{tmp_path}/store", NAMESPACE)
        for chain in CHAINS:
            store.write(run_of(chain))
        host = {"name": "t", "folder": f"{tmp_path}/arena", "bytes": "8MiB"}
        cache_section = {"store": store.url, "host": host}
        config = tmp_path / "cluster.yaml"
        config.write_text(json.dumps({"model": "m", "cache": cache_section}))
        arguments = ["warm", "--config", str(config), "--json"]
        assert "no arena 't' runs" in said(capsys, 2, arguments)
        with owner_of(HostConfig.model_validate(host)) as arena:
            pin = ["--pin", "1h"] if is_pinned else []
            assert main(["cache", *arguments, *pin]) == 0
            assert json.loads(capsys.readouterr().out)["num_blocks"] == NUM_BLOCKS
            peer = open_node_tier(arena, NAMESPACE.fingerprint, BLOCK_BYTES)
            with closing(peer):
                for chain in CHAINS:
                    lease = peer.lease(chain.hashes)
                    assert lease.to_store == ()  # it is the cluster's own shared tier
                    found = [bytes(peer.buffer(slot)) for slot in lease.slots]
                    assert found == [payload_of(h) for h in chain.hashes]
                    peer.release(lease)

    def test_without_an_arena_it_says_so(
        self, store: FsBlockStore, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = f"none-{uuid.uuid4().hex[:8]}"
        text = said(capsys, 2, ["warm", "--store", store.url, "--arena", name])
        assert f"no arena {name!r} runs on this machine" in text
        bad = said(capsys, 2, ["warm", "--store", store.url, "--arena", "a/b"])
        assert "no name of an arena" in bad


class TestBench:
    def test_every_row_is_measured_and_nothing_is_left(
        self,
        url: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        layouts = {label: cache_bench.LAYOUTS[label] for label in ("720KiB", "1.25MiB")}
        monkeypatch.setattr(cache_bench, "LAYOUTS", layouts)
        monkeypatch.setattr(cache_bench, "QUICK", cache_bench.Plan(1 << 20, 1, 1.0))
        data = data_of(capsys, "bench", url, "--quick")
        assert data["sizes"].keys() == layouts.keys()
        for rows in data["sizes"].values():
            names = {"memcpy", "host put", "host get", "store put", "store get"}
            if url.startswith("file:"):
                names |= {"file write", "file read", "file read, cold"}
                names |= {"store get, cold", "store put, recycling"}
            assert names <= rows.keys() <= names | {"direct read"}
            assert all(row["gb_per_s"] > 0 for row in rows.values())
            host_get = rows["host get"]["gb_per_s"] / rows["memcpy"]["gb_per_s"]
            assert rows["host get"]["of_limit"] == pytest.approx(host_get)
        assert WholeStore(url).find() == []
        assert not list(tmp_path.rglob("*.arrow"))

    def test_the_table_names_the_limits(self, capsys: pytest.CaptureFixture[str]) -> None:
        rates = {
            "720KiB": {"memcpy": 10.0, "host put": 6.5},
            "4MiB": {"memcpy": 8.0, "host put": 4},
        }
        show(None, cache_bench.as_table(rates, {"memcpy": None, "host put": "memcpy"}))
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows[0] == ["720KiB", "4MiB"]
        assert rows[-2] == ["memcpy", "10.00", "8.00"]
        assert rows[-1] == ["host", "put", "/", "memcpy", "6.50", "(0.65)", "4.00", "(0.50)"]

    def test_a_route_that_loses_bytes_is_an_error(self) -> None:
        blocks = cache_bench.Blocks(NAMESPACE, 8)
        lazy = cache_bench.Route("lazy", None, lambda: None, fills_pool=True)
        with pytest.raises(Exception, match="lazy: the bytes that came back"):
            cache_bench.run_rounds(blocks, [lazy], cache_bench.QUICK)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["gc", "--store", "{}"], "--max-bytes 100GiB, --max-age 7d, or both"),
        (["gc", "--store", "{}", "--max-bytes", "lots"], "write 100GiB, 500MB"),
        (["gc", "--store", "{}", "--max-age", "7"], "write 7d, 12h, 30m or 90s"),
        (["ls", "--store", "{}", "--namespace", "zz"], "there are: "),
        (["ls", "--store", "{}", "--namespace", ""], "fits more than one namespace"),
        (["ls", "--store", "{}", "--options", "[1]"], "takes a JSON object"),
        (["ls", "--store", "{}", "--options", "{{"], "--options is not JSON"),
        (["ls", "--store", "nosuch://x/y"], "nosuch"),
        (["ls", "--store", "$KVCOMMONS_UNSET/x"], "KVCOMMONS_UNSET"),
        (["ls", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["ls", "--config", "configs/host-only.yaml"], "names no store; give --store URL"),
        (["warm", "--store", "{}", "--pin", "long"], "write 7d, 12h, 30m or 90s"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    store: FsBlockStore,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fix: str,
) -> None:
    filled = [one.format(store.url) for one in arguments]
    assert fix in said(capsys, 2, filled)


@pytest.mark.parametrize(
    "arguments", [["cache"], ["cache", "ls"], ["cache", "ls", "--store", "a", "--config", "b"]]
)
def test_a_wrong_command_line_is_explained(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_units() -> None:
    assert parse_bytes("100GiB") == 100 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes("4096") == 4096
    assert parse_duration_s("7d") == 7 * 86400
    assert parse_duration_s("1.5h") == 5400
    assert parse_duration_s(" 90 s ") == 90
    for text in ("", "0", "-1GiB", "GiB", "1e400"):
        with pytest.raises(ConfigError):
            parse_bytes(text)
    for text in ("", "7", "0d", "-1d", "1y", "nan"):
        with pytest.raises(ConfigError):
            parse_duration_s(text)
    ages = [show_age(1000.0 - age_s, 1000.0) for age_s in (0, 90, 150, 900, -5)]
    assert ages == ["0s ago", "90s ago", "2m ago", "15m ago", "in the future"]
    assert show_age(None, 1000.0) == show_age(0.0, 1000.0) == "-"
