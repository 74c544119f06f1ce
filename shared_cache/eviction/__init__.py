"""Eviction policies: which blocks a tier drops to make room.

A block without its parents can never be matched again, so a policy that dropped a prompt's first
block before its last would fill a tier with dead blocks. Policies are therefore told of whole runs,
and rank the blocks of one run from its end; the tier refuses a block whose children are still
there. They know nothing of slots, leases or bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from shared_cache.eviction.lru import LruPolicy
from shared_cache.eviction.policy import MAX_REFUSED, EvictionPolicy
from shared_cache.eviction.priority import PriorityPolicy
from shared_cache.eviction.s3fifo import S3FifoPolicy

__all__ = [
    "MAX_REFUSED",
    "EvictionPolicy",
    "LruPolicy",
    "PolicyName",
    "PriorityPolicy",
    "S3FifoPolicy",
    "make_policy",
]

PolicyName = Literal["lru", "s3fifo", "priority"]


def make_policy(name: PolicyName, clock: Callable[[], float]) -> EvictionPolicy:
    """A new policy by the name it has in the configuration."""
    makers: dict[PolicyName, Callable[[], EvictionPolicy]] = {
        "lru": LruPolicy,
        "s3fifo": S3FifoPolicy,
        "priority": partial(PriorityPolicy, clock),
    }
    return makers[name]()
