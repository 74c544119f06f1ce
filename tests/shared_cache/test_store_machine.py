"""Any history of writes, reads, deletions and damage, compared with a dict of objects.

What is read is always right. What is found lies between two bounds: at least what a fresh process
finds by walking the chain from its first block, at most what any object holds.
"""

import shutil
import tempfile
import uuid
from collections.abc import Sequence

import fsspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from shared_cache.hashing import BlockHash, BlockHashChain
from shared_cache.stores.fs_store import FsBlockStore, open_store
from shared_cache.stores.store import BlockRun
from tests.shared_cache.fakes import BLOCK_BYTES, LAYOUT, NAMESPACE, run_of
from tests.shared_cache.store_contract import payloads_of, read_all

BLOCKS_PER_CHAIN = 6
HEAD_BYTES = 4096


def branching_chain(forks: Sequence[bool]) -> BlockHashChain:
    """A chain of `BLOCKS_PER_CHAIN` blocks; equal leading `forks` give equal leading blocks."""
    tokens = [int(fork) for fork in forks for _ in range(LAYOUT.tokens_per_block)]
    return BlockHashChain(LAYOUT.tokens_per_block, tokens=tokens)


chains = st.lists(st.booleans(), min_size=BLOCKS_PER_CHAIN, max_size=BLOCKS_PER_CHAIN).map(
    branching_chain
)
lengths = st.integers(0, BLOCKS_PER_CHAIN)


class StoreMachine(RuleBasedStateMachine):
    """`objects` is the truth: what lies under each name. Damaged names may be misses or removed."""

    names: Bundle[str] = Bundle("names")

    def make_url(self) -> str:
        raise NotImplementedError

    def open(self) -> FsBlockStore:
        return open_store(self.url, NAMESPACE)

    @initialize()
    def begin(self) -> None:
        self.url = self.make_url()
        self.store = self.open()
        self.objects: dict[str, tuple[BlockHash, ...]] = {}
        self.damaged: set[str] = set()
        self.has_stale_hints = False

    def path(self, name: str) -> str:
        root = fsspec.url_to_fs(self.url)[1]
        return f"{root}/v2/{NAMESPACE.fingerprint}/{name}"

    def name_of(self, block_hash: BlockHash) -> str:
        return f"{block_hash.hex()[:2]}/{block_hash.hex()}.arrow"

    def least_match(self, hashes: Sequence[BlockHash]) -> int:
        """What a fresh process finds in undamaged objects."""
        index = 0
        while index < len(hashes):
            name = self.name_of(hashes[index])
            if name not in self.objects or name in self.damaged:
                break
            for block_hash in self.objects[name]:
                if index == len(hashes) or hashes[index] != block_hash:
                    break
                index += 1
        return index

    def most_match(self, hashes: Sequence[BlockHash]) -> int:
        stored = {h for run in self.objects.values() for h in run}
        return next((i for i, h in enumerate(hashes) if h not in stored), len(hashes))

    def note_removals(self) -> bool:
        """Damaged objects that a store has come across are gone, good ones never; any gone?"""
        fs, root = fsspec.url_to_fs(self.url)
        present = {path for path in fs.find(root) if path.endswith(".arrow")}
        gone = {name for name in self.objects if self.path(name) not in present}
        assert gone <= self.damaged
        assert len(present) == len(self.objects) - len(gone)
        for name in gone:
            del self.objects[name]
            self.damaged.discard(name)
        return bool(gone)

    @rule(target=names, chain=chains, start=lengths, stop=lengths)
    def write(self, chain: BlockHashChain, start: int, stop: int) -> str:
        whole = run_of(chain)
        run = BlockRun(whole.parent, whole.hashes[:stop], whole.payloads[:stop]).tail(
            min(start, stop)
        )
        num_found = self.store._runs.match(run.hashes, set())  # writing believes nothing remembered
        self.note_removals()
        written = self.store.write(run)
        assert written == len(run.hashes) - num_found
        if not written:
            return ""
        name = self.name_of(run.hashes[num_found])
        self.objects[name] = run.hashes[num_found:]
        self.damaged.discard(name)
        assert self.store._runs.match(run.hashes, set()) == len(run.hashes)
        return name

    @rule(chain=chains, length=lengths)
    def match(self, chain: BlockHashChain, length: int) -> None:
        hashes = chain.hashes[:length]
        num_found = self.store.match(hashes)
        assert num_found >= self.least_match(hashes)
        if not self.has_stale_hints:
            assert num_found <= self.most_match(hashes)
        self.note_removals()
        assert self.open().match(hashes) >= self.least_match(hashes)
        self.has_stale_hints |= self.note_removals()

    @rule(chain=chains, start=lengths)
    def read(self, chain: BlockHashChain, start: int) -> None:
        hashes = chain.hashes[start:]
        least, most = self.least_match(hashes), self.most_match(hashes)
        found = read_all(self.store, hashes)
        assert found == payloads_of(hashes[: len(found)])
        assert least <= len(found) <= most
        self.note_removals()

    @rule(name=consumes(names), by_another_process=st.booleans())
    def delete(self, name: str, by_another_process: bool) -> None:
        if name not in self.objects:
            return
        store = self.open() if by_another_process else self.store
        store.delete(name)
        self.has_stale_hints |= by_another_process
        del self.objects[name]
        self.damaged.discard(name)

    @rule(name=names, position=st.integers(0, HEAD_BYTES + BLOCKS_PER_CHAIN * BLOCK_BYTES - 1))
    def flip(self, name: str, position: int) -> None:
        if name in self.objects:
            data = bytearray(self.read_file(name))
            data[position % len(data)] ^= 1
            self.write_file(name, bytes(data))

    @rule(name=names, length=st.integers(1, HEAD_BYTES + BLOCKS_PER_CHAIN * BLOCK_BYTES))
    def cut(self, name: str, length: int) -> None:
        if name in self.objects:
            self.write_file(name, self.read_file(name)[:length])

    @rule(with_listing=st.booleans())
    def reopen(self, with_listing: bool) -> None:
        self.store = self.open()
        self.has_stale_hints = False
        if with_listing:
            listed = {entry.name: entry.hashes for entry in self.store.entries()}
            self.note_removals()
            assert listed.items() <= self.objects.items()
            assert self.objects.keys() - listed.keys() <= self.damaged

    @invariant()
    def no_temporaries_stay(self) -> None:
        if hasattr(self, "url"):
            fs, root = fsspec.url_to_fs(self.url)
            assert not [path for path in fs.find(root) if path.endswith(".tmp")]

    def read_file(self, name: str) -> bytes:
        return fsspec.url_to_fs(self.url)[0].cat_file(self.path(name))

    def write_file(self, name: str, data: bytes) -> None:
        fsspec.url_to_fs(self.url)[0].pipe_file(self.path(name), data)
        self.damaged.add(name)


class LocalMachine(StoreMachine):
    def make_url(self) -> str:
        self.folder = tempfile.mkdtemp()
        return f"file://{self.folder}"

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


class RecyclingMachine(LocalMachine):
    """Deleted files are overwritten by the next objects; compressed ones have any size."""

    def open(self) -> FsBlockStore:
        return open_store(self.url, NAMESPACE, codec="shuffle-zstd", spare_bytes=1 << 20)


class ObjectsMachine(StoreMachine):
    def make_url(self) -> str:
        return f"memory:///{uuid.uuid4().hex}"

    def teardown(self) -> None:
        if hasattr(self, "url"):
            fs, root = fsspec.url_to_fs(self.url)
            fs.rm(root, recursive=True)


SETTINGS = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestLocalMachine = LocalMachine.TestCase
TestLocalMachine.settings = SETTINGS
TestRecyclingMachine = RecyclingMachine.TestCase
TestRecyclingMachine.settings = SETTINGS
TestObjectsMachine = ObjectsMachine.TestCase
TestObjectsMachine.settings = SETTINGS
