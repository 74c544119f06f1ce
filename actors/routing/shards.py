"""Which router decides for whom, when one is not enough. Pure.

A router has to know all load of the replicas that it chooses from, so several routers must not
share replicas or their prompts at random: each has the tenants (or models) that hash to it. Every
ingress comes to the same answer alone, and one router more moves only the share of it.
"""

import hashlib


def shard_of(tenant: str | None, model: str, num_shards: int) -> int:
    """The number of the router for this tenant's prompts to this model, below `num_shards`.

    The highest of one score per shard wins (rendezvous hashing). Raises `ValueError` without any.
    """
    if num_shards < 1:
        raise ValueError(f"there must be at least 1 router, not {num_shards}")
    if num_shards == 1:
        return 0
    who = f"{model}\0{'' if tenant is None else tenant}\0{tenant is None}".encode()
    return max(range(num_shards), key=lambda shard: _score(who, shard))


def router_name(cluster: str, shard: int) -> str:
    """The actor's name of that router; the first has no number."""
    return f"{cluster}-router-{shard}" if shard else f"{cluster}-router"


def _score(who: bytes, shard: int) -> bytes:
    return hashlib.sha256(shard.to_bytes(8, "little") + who).digest()
