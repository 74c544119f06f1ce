"""What serving a prompt on one replica costs: its own wait, and that of those who come later.

Counting requests takes a prompt of 100k tokens for one of 100; counting only the own wait spreads
prompts over all caches, which lowers the hit rate, which raises load, which spreads more, until
the cluster collapses. So all is in seconds of prefill, and a second has a price that grows with
the square of the queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from actors.routing.measured import MeasuredSpeeds, Speeds
from actors.routing.views import NO_MATCH, ClusterView, Match, PromptView, ReplicaView

SOFT_LIMIT = 0.5
"""The share of KV memory above which it has a price."""


class Plan(NamedTuple):
    """How a replica is expected to serve a prompt: tokens by source, and seconds.

    `work_s` is prefill on an idle replica, `host_load_s` and `store_load_s` what loading takes
    when the links are free, `first_token_s` the prediction with everything that is before it.
    """

    device_tokens: int
    host_tokens: int
    shared_tokens: int
    computed_tokens: int
    kv_tokens: int
    work_s: float
    host_load_s: float = 0.0
    store_load_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def cached_tokens(self) -> int:
        """Tokens that are not computed."""
        return self.device_tokens + self.host_tokens + self.shared_tokens


@dataclass(frozen=True, slots=True)
class CostWeights:
    """The rule's own constants; none is a property of the hardware or of a trace.

    `doubt` is added per pending request, in mean prefills: a busy replica that looks nearly free
    is not trusted. `price` times the square of the mean pending requests is what a second of
    prefill costs the others. `memory` times the mean stream is the price of KV memory above
    `SOFT_LIMIT`, by the square of the share: who holds it makes others wait. `affinity` is how many
    mean prefills more the replica that had a session's last prompt may cost; 0 leaves it to the
    caches, which remember sessions anyway.
    """

    doubt: float = 0.4
    price: float = 8.0
    memory: float = 0.8
    affinity: float = 0.0


class Option(NamedTuple):
    """One way to serve a prompt: from where how much, and seconds when nothing is before it."""

    device_tokens: int
    host_tokens: int
    shared_tokens: int
    host_load_s: float
    store_load_s: float
    work_s: float


class Rates(NamedTuple):
    """The same for all replicas of one decision: see `CostModel.cost`."""

    slowing: float
    doubt_s: float
    price: float


class Offer(NamedTuple):
    """What replicas with one match can do: all options, and what the last of them costs.

    `least_s` is what any of them costs at least; `is_settled` that the last one is the soonest
    wherever the links are free, for `fixed_s` and `work_s` times the slow-down.
    """

    options: list[Option]
    fixed_s: float
    work_s: float
    least_s: float
    is_settled: bool


class CostModel:
    """Predictions for one prompt and one replica; pure, and the speeds are read at each call."""

    def __init__(self, measured: MeasuredSpeeds, weights: CostWeights | None = None) -> None:
        self._measured = measured
        self.weights = weights or CostWeights()

    @property
    def speeds(self) -> Speeds:
        """What is known now."""
        return self._measured.speeds

    def slowdown(self, replica: ReplicaView) -> float:
        """How many times longer prefill takes beside what the replica is decoding; at least 1."""
        return 1 + self.speeds.decode_slowdown * replica.running_kv_tokens

    def wait_s(self, replica: ReplicaView, now_s: float) -> float:
        """Seconds until what is booked on the replica has its first tokens."""
        return queue_s(replica, self.slowdown(replica), now_s) if replica.num_pending else 0.0

    def memory_wait_s(self, prompt: PromptView, replica: ReplicaView) -> float:
        """Seconds until enough KV memory is free, as running requests end."""
        if not replica.kv_capacity_tokens:
            return 0.0
        return self._memory_wait_s(self._over(prompt, replica), replica)

    def kv_tokens(self, prompt: PromptView) -> int:
        """KV memory that the prompt and its output will take."""
        output = prompt.output_tokens
        return prompt.num_tokens + (int(self.speeds.output_tokens) if output is None else output)

    def options(self, prompt: PromptView, match: Match) -> list[Option]:
        """The ways to serve a prompt where `match` is there: load all, less, or nothing.

        At least one token is always computed.
        """
        most = prompt.num_tokens - 1
        device = min(match.device_tokens, most)
        host = min(max(device, match.host_tokens), most)
        shared = min(prompt.shared_tokens, most)
        found = [self._option(prompt, device, device, device)]
        if host > device:
            found.append(self._option(prompt, device, host, host))
        if shared > host:
            found.append(self._option(prompt, device, host, shared))
        return found

    def _option(self, prompt: PromptView, device: int, host: int, shared: int) -> Option:
        speeds = self.speeds
        return Option(
            device_tokens=device,
            host_tokens=host - device,
            shared_tokens=shared - host,
            host_load_s=(host - device) * speeds.host_token_s,
            store_load_s=(shared - host) * speeds.store_token_s,
            work_s=speeds.prefill_s(prompt.num_tokens - shared, shared),
        )

    def soonest(
        self, options: Sequence[Option], replica: ReplicaView, now_s: float
    ) -> tuple[float, Option]:
        """The option with the earliest first token, and seconds from its load to that."""
        slow = 1 + self.speeds.decode_slowdown * replica.running_kv_tokens
        best_s, best = inf, options[0]
        for option in options:
            own_s = option.work_s * slow
            if option.host_load_s:
                own_s += option.host_load_s
                if replica.host_link_free_s > now_s:
                    own_s += replica.host_link_free_s - now_s
            if option.store_load_s:
                own_s += option.store_load_s
                if replica.store_link_free_s > now_s:
                    own_s += replica.store_link_free_s - now_s
            if own_s < best_s:
                best_s, best = own_s, option
        return best_s, best

    def rates(self, cluster: ClusterView) -> Rates:
        """What a decision needs of speeds, weights and the state of the whole cluster."""
        speeds, weights = self.speeds, self.weights
        return Rates(
            slowing=speeds.decode_slowdown,
            doubt_s=weights.doubt * speeds.work_s,
            price=weights.price * cluster.mean_pending**2,
        )

    def offer(self, prompt: PromptView, match: Match, rates: Rates) -> Offer:
        """What any replica with this match can offer.

        If loading all is soonest without decodes, it is with them too, unless a link is busy.
        """
        options = self.options(prompt, match)
        last = options[-1]
        loads_s = last.host_load_s + last.store_load_s
        fixed_s = loads_s + rates.price * last.work_s
        least_s = min(
            one.host_load_s + one.store_load_s + one.work_s * (1 + rates.price) for one in options
        )
        soonest_s = min(one.host_load_s + one.store_load_s + one.work_s for one in options)
        is_settled = loads_s + last.work_s <= soonest_s
        return Offer(options, fixed_s, last.work_s, least_s, is_settled)

    def own_cost(
        self, offer: Offer, replica: ReplicaView, cluster: ClusterView, rates: Rates
    ) -> float:
        """Seconds from the begin of the load to the first token, and the price of the prefill."""
        own_s, option = self.soonest(offer.options, replica, cluster.now_s)
        return own_s + rates.price * option.work_s

    def cost(self, prompt: PromptView, replica: ReplicaView, cluster: ClusterView) -> float:
        """Seconds: the own first token, doubt about it, and what it costs the others."""
        rates = self.rates(cluster)
        match = NO_MATCH if replica.is_load_only else prompt.match(replica.replica_id)
        own_s = self.own_cost(self.offer(prompt, match, rates), replica, cluster, rates)
        wait_s = self.wait_s(replica, cluster.now_s) + rates.doubt_s * replica.num_pending
        return self.with_memory(own_s + wait_s, prompt, replica)

    def with_memory(self, cost_s: float, prompt: PromptView, replica: ReplicaView) -> float:
        """A cost with what KV memory adds: the wait for it, and the price of the last of it."""
        capacity = replica.kv_capacity_tokens
        if not capacity:
            return cost_s
        lacking = self._over(prompt, replica)
        if lacking > 0:
            wait_s = self._memory_wait_s(lacking, replica)
            cost_s = wait_s if wait_s > cost_s else cost_s
        over = lacking / capacity + 1 - SOFT_LIMIT
        if over > 0:
            cost_s += self.weights.memory * self.speeds.stream_s * over * over
        return cost_s

    def _over(self, prompt: PromptView, replica: ReplicaView) -> int:
        """KV tokens that the prompt needs beyond what is free; negative when there is room."""
        new = self.kv_tokens(prompt) - prompt.match(replica.replica_id).device_tokens
        return replica.kv_tokens + new - replica.kv_capacity_tokens

    def _memory_wait_s(self, lacking: int, replica: ReplicaView) -> float:
        running = min(replica.running_kv_tokens, replica.kv_tokens)
        return lacking * self.speeds.stream_s / running if lacking > 0 and running else 0.0

    def plan(self, prompt: PromptView, replica: ReplicaView, now_s: float) -> Plan:
        """How the replica would serve the prompt: from the sources that are expected soonest."""
        match = NO_MATCH if replica.is_load_only else prompt.match(replica.replica_id)
        own_s, option = self.soonest(self.options(prompt, match), replica, now_s)
        wait_s = max(self.wait_s(replica, now_s), self.memory_wait_s(prompt, replica))
        cached = option.device_tokens + option.host_tokens + option.shared_tokens
        return Plan(
            device_tokens=option.device_tokens,
            host_tokens=option.host_tokens,
            shared_tokens=option.shared_tokens,
            computed_tokens=prompt.num_tokens - cached,
            kv_tokens=self.kv_tokens(prompt),
            work_s=option.work_s,
            host_load_s=option.host_load_s,
            store_load_s=option.store_load_s,
            first_token_s=self.speeds.overhead_s + wait_s + own_s,
        )


def queue_s(replica: ReplicaView, slow: float, now_s: float) -> float:
    """What is left of the pending prefills, of which the first one runs since it is the first."""
    done_s, head_s = now_s - replica.busy_since_s, replica.head_work_s * slow
    if done_s > head_s:
        done_s = head_s
    elif done_s < 0:
        done_s = 0.0
    return replica.pending_work_s * slow - done_s
