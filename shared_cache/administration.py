"""What an administrator asks of one replica's cache: try the store, look a block up, forget, pin.

None of it is for a request's path: all of it may wait for stores, past the guards that keep those
away from requests, so that the answer is what is true now and not what was true at the last fault.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from shared_cache.errors import StoreReadOnlyError
from shared_cache.fates import NO_FAULTS, BlockState
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope
from shared_cache.namespace import Namespace
from shared_cache.prefix_cache import PrefixCache
from shared_cache.sharded import ShardedCache
from shared_cache.staging import SharedCache
from shared_cache.stores.store import BlockRun, BlockStore

_CANARY_ROOT = BlockHash(hashlib.sha256(b"kvcommons.canary.v1\0").digest())


@dataclass(frozen=True, slots=True)
class StoreProblem:
    """Why the shared tier cannot be used as it should be."""

    kind: Literal["no_store", "read_only", "unreachable", "lacks_block", "wrong_bytes"]
    text: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How many blocks left host memory, and how many objects the shared tier."""

    num_host_blocks: int
    num_objects: int


def shards_of(cache: PrefixCache) -> tuple[SharedCache, ...]:
    """The caches of its ranks; one, of an engine on one device."""
    if isinstance(cache, ShardedCache):
        return cache.shards
    return (cache,) if isinstance(cache, SharedCache) else ()


def write_mark(cache: PrefixCache, mark: bytes) -> StoreProblem | None:
    """Write a block named by `mark` to the shared tier, as every rank; why that fails, if it does.

    Its bytes follow from the mark. Remove it with `remove_mark`.
    """

    def write(store: BlockStore) -> StoreProblem | None:
        if store.read_only:
            text = f"{_name(store)} may only be read: it could not be written to at start"
            return StoreProblem("read_only", text)
        name, payload = _marked(store, mark)
        store.write(BlockRun(_CANARY_ROOT, (name,), (memoryview(payload),)))
        return None

    return _first_problem(cache, write)


def read_mark(cache: PrefixCache, mark: bytes) -> StoreProblem | None:
    """Read what `write_mark` has written, in whichever process; why that fails, if it does."""

    def read(store: BlockStore) -> StoreProblem | None:
        name, expected = _marked(store, mark)
        found = bytearray(len(expected))
        if not store.match([name]) or not store.read_into([name], [memoryview(found)]):
            text = f"{_name(store)} does not have what the other replica has just written there"
            return StoreProblem("lacks_block", f"{text}: is it the same place for both?")
        if found != expected:
            text = f"{_name(store)} gave other bytes than the other replica has written"
            return StoreProblem("wrong_bytes", text)
        return None

    return _first_problem(cache, read)


def remove_mark(cache: PrefixCache, mark: bytes) -> StoreProblem | None:
    """Delete what `write_mark` has written; no error if it is gone."""

    def remove(store: BlockStore) -> StoreProblem | None:
        if not store.read_only:
            store.forget([_marked(store, mark)[0]])
        return None

    return _first_problem(cache, remove)


def block_state(cache: PrefixCache, chain: Sequence[BlockHash]) -> BlockState:
    """Where the last block of `chain` is now, in all shards, and what happened to it here last."""
    states = [_shard_state(shard, chain) for shard in shards_of(cache)]
    answers = [one.is_stored for one in states]
    fates = [one.fate for one in states if one.fate is not None]
    dropped = [one for one in fates if one.kind == "dropped"]
    return BlockState(
        is_in_host=bool(states) and all(one.is_in_host for one in states),
        is_stored=None if None in answers or not answers else all(answers),
        fate=next(iter([*dropped, *fates]), None),
        faults=next((one.faults for one in states if one.faults != NO_FAULTS), NO_FAULTS),
    )


def forget(cache: PrefixCache, hashes: Sequence[BlockHash]) -> Forgotten:
    """Remove blocks from host memory, where nobody leases them, and from the shared tier.

    An object goes as a whole: also the blocks that follow in it. Raises `StoreError`.
    """
    num_host = num_objects = 0
    for shard in shards_of(cache):
        store = shard.shared_store
        if store is not None and not store.read_only:
            num_objects += store.forget(hashes)
        num_host += shard.host.drop(hashes)
        shard.host.stored(hashes, is_stored=False)
    return Forgotten(num_host, num_objects)


def pin(
    cache: PrefixCache,
    hashes: Sequence[BlockHash],
    ttl_s: float,
    scope: ReuseScope = DEFAULT_SCOPE,
) -> int:
    """Bring blocks into this machine's memory and keep them there for `ttl_s`; 0 ends their pins.

    How many leading blocks that are now. Those that are nowhere stored are not computed for it.
    """
    if not ttl_s:
        return min((shard.host.pin(hashes, 0.0) for shard in shards_of(cache)), default=0)
    staged = cache.grow(cache.lease(hashes, scope=scope), hashes)
    try:
        return min((shard.host.pin(hashes, ttl_s) for shard in shards_of(cache)), default=0)
    finally:
        cache.release(staged)


def elsewhere(cache: PrefixCache, chain: Sequence[BlockHash]) -> tuple[str, ...]:
    """The other namespaces of the shared tier that hold the last block of `chain`, and why other.

    Raises `StoreError`.
    """
    shards = shards_of(cache)
    store = shards[0].shared_store if shards else None
    if store is None:
        return ()
    from shared_cache.upkeep.whole_store import WholeStore  # brings all that can list and delete

    tier = shards[0].config.all_tiers[-1]
    whole = WholeStore(tier.url, tier.options)
    found = []
    for one in whole.find():
        if one.namespace is None or one.namespace == store.namespace:
            continue
        with closing(whole.open(one.namespace)) as other:
            if other.match(chain) == len(chain):
                found.append(_told(store.namespace, one.namespace))
    return tuple(found)


def forget_all(cache: PrefixCache) -> Forgotten:
    """Remove every block of this namespace that is not leased. Raises `StoreError`.

    Of host memory, what the store lists or this process has had: other blocks go when they must.
    """
    num_host = num_objects = 0
    for shard in shards_of(cache):
        names = set(shard.fates.hashes())
        store = shard.shared_store
        if store is not None and not store.read_only:
            for run in list(store.entries()):
                names.update(run.hashes)
                store.delete(run.name)
                num_objects += 1
        num_host += shard.host.drop(list(names))
    return Forgotten(num_host, num_objects)


def _told(ours: Namespace, other: Namespace) -> str:
    fields = ours.differences(other).items()
    text = ", ".join(f"{field} {theirs!r} instead of {mine!r}" for field, (mine, theirs) in fields)
    return f"namespace {other.fingerprint[:12]}: {text}"


def _shard_state(shard: SharedCache, chain: Sequence[BlockHash]) -> BlockState:
    store, is_stored = shard.shared_store, None
    lease = shard.host.lease(chain, len(chain) - 1)
    shard.host.release(lease)
    if store is not None:
        try:
            is_stored = store.match(chain) == len(chain) or store.match(chain[-1:]) == 1
        except Exception:  # whatever its file system raises
            is_stored = None
    faults = NO_FAULTS if store is None else store.faults
    return BlockState(bool(lease.slots), is_stored, shard.fates.of(chain[-1]), faults)


def _first_problem(
    cache: PrefixCache, try_store: Callable[[BlockStore], StoreProblem | None]
) -> StoreProblem | None:
    for shard in shards_of(cache):
        store = shard.shared_store
        if store is None:
            return StoreProblem("no_store", "no shared tier is configured (`cache.tiers`)")
        try:
            problem = try_store(store)
        except StoreReadOnlyError as error:
            return StoreProblem("read_only", str(error))
        except Exception as error:  # whatever its file system raises
            return StoreProblem("unreachable", str(error) or repr(error))
        if problem is not None:
            return problem
    return None


def _marked(store: BlockStore, mark: bytes) -> tuple[BlockHash, bytearray]:
    """The name and the bytes of a mark's block in this store."""
    name = hashlib.sha256(_CANARY_ROOT + mark).digest()
    num_bytes = store.namespace.layout.block_bytes
    return BlockHash(name), bytearray((name * (num_bytes // len(name) + 1))[:num_bytes])


def _name(store: BlockStore) -> str:
    return str(getattr(store, "url", "the store"))
