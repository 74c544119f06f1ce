"""What an ingress knows of the replicas by itself, for when the router is away. Pure."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from actors.router_messages import Lost, Reply, Report


@dataclass(slots=True)
class OwnView:
    """Who was up when the router last told, and what this ingress has there itself."""

    version: tuple[str, int] = ("", 0)
    boots: dict[str, str] = field(default_factory=dict)
    dead: dict[str, str] = field(default_factory=dict)
    num_open: dict[str, int] = field(default_factory=dict)

    def told(self, reply: Reply, untold: Sequence[Report]) -> None:
        """The router's list is newer than what we know of the dead, but for what is `untold`."""
        self.version = reply.version
        if reply.replicas is not None:
            self.boots = dict(reply.replicas)
            self.dead = {one.replica_id: one.boot_id for one in untold if isinstance(one, Lost)}

    def least_busy(self, avoid: Collection[str], rng: random.Random) -> str | None:
        """The replica with the fewest requests from here; ties at random. None if none is up."""
        able = [
            one
            for one, boot in self.boots.items()
            if one not in avoid and self.dead.get(one) != boot
        ]
        return min(able, key=lambda one: (self.num_open.get(one, 0), rng.random()), default=None)

    def count(self, replica_id: str, num: int) -> None:
        """So many requests more run there."""
        self.num_open[replica_id] = self.num_open.get(replica_id, 0) + num
