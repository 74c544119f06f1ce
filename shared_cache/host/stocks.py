"""How many slots each client may reserve ahead, so that idle clients do not hold the cache empty.

A stock holds no block. With an eighth of the slots for every client, eight idle ones would evict
everything. So the stocks of all clients of a namespace share one allowance, and who has more than
its share gives the rest back as soon as it asks, which every client does about once a second.
"""

from shared_cache.host.interface import HostStats

STOCK_PART = 8
"""All stocks together have at most one of so many slots of their namespace."""


class StockShares:
    """The stocks of one namespace's clients, by a key of each; those that ended are forgotten."""

    def __init__(self) -> None:
        self._sizes: dict[object, int] = {}

    def ask(
        self, client: object, num_slots: int, num_had: int, stats: HostStats
    ) -> tuple[int, int]:
        """How many of `num_slots` more slots a client may have, and how large its stock may be.

        It has `num_had`. What is free may go to whoever is below its share at once; blocks are
        evicted only as long as all stocks together stay within the allowance.
        """
        self._sizes[client] = num_had
        num_clients = len(self._sizes)
        allowance = allowance_of(stats.num_slots, num_clients)
        share = max(1, allowance // num_clients)
        room = max(allowance - sum(self._sizes.values()), stats.free_slots)
        return max(0, min(num_slots, share - num_had, room)), share

    def granted(self, client: object, num_slots: int) -> None:
        """The client has so many more."""
        self._sizes[client] += num_slots

    def forget(self, client: object) -> None:
        """The client has gone."""
        self._sizes.pop(client, None)


def allowance_of(num_slots: int, num_clients: int) -> int:
    """How many slots all stocks together may have; one for each client if that leaves half."""
    return max(1, num_slots // STOCK_PART, min(num_clients, num_slots // 2))
