"""The rules of other routers that look at caches, as their sources and papers have them.

They get the same bookings and the same index as ours, which is kinder than their own: theirs is
polled, approximated or never forgets.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from actors.routing.cost import CostModel
from actors.routing.policies import Knowledge
from actors.routing.rivals import Rule, fewest_outstanding
from actors.routing.views import ClusterView, PromptView, ReplicaView


class PrefixFirstPolicy(Rule):
    """Where the longest prefix was sent to before: Ray's prefix-aware router.

    Below a matched share of 10 % the replica that was sent the fewest tokens. Its threshold for
    imbalance is infinite by default, so load only breaks ties.
    """

    knowledge: Knowledge = "routed"
    LEAST_MATCH = 0.1

    def __init__(self, cost: CostModel, rng: random.Random) -> None:
        super().__init__(cost, rng)
        self._sent: Counter[str] = Counter()

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The fewest outstanding of the holders, or of those that were sent the least."""
        best = max(_device(prompt, one) for one in cluster.replicas)
        if best >= self.LEAST_MATCH * prompt.num_tokens:
            able = [one for one in cluster.replicas if _device(prompt, one) == best]
        else:
            least = min(self._sent[one.replica_id] for one in cluster.replicas)
            able = [one for one in cluster.replicas if self._sent[one.replica_id] == least]
        chosen = fewest_outstanding(able, self.rng)
        self._sent[chosen.replica_id] += prompt.num_tokens - _device(prompt, chosen)
        return chosen


class SglangPolicy(Rule):
    """SGLang's cache_aware: the matching replica while load is balanced, else the least loaded.

    Defaults of its Python package.
    """

    knowledge: Knowledge = "routed"
    CACHE_THRESHOLD = 0.3
    BALANCE_ABS = 64
    BALANCE_REL = 1.5

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """See the class."""
        loads = [one.num_outstanding for one in cluster.replicas]
        low, high = min(loads), max(loads)
        is_balanced = high - low <= self.BALANCE_ABS or high <= self.BALANCE_REL * low
        best = max(cluster.replicas, key=partial(_device, prompt))
        if is_balanced and _device(prompt, best) > self.CACHE_THRESHOLD * prompt.num_tokens:
            return best
        return fewest_outstanding(cluster.replicas, self.rng)


class LmetricPolicy(Rule):
    """SGLang's lmetric: tokens to compute times requests in flight."""

    knowledge: Knowledge = "routed"

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The smallest product; then at random."""

        def score(one: ReplicaView) -> float:
            return (prompt.num_tokens - _device(prompt, one)) * (one.num_outstanding + 1)

        return least(score, cluster, self.rng)


class DynamoPolicy(Rule):
    """Dynamo's KV router: tokens to prefill less the overlap, plus those being decoded."""

    knowledge: Knowledge = "events"
    HOST_CREDIT = 0.75

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The smallest sum; then at random."""

        def score(one: ReplicaView) -> float:
            match = prompt.match(one.replica_id)
            on_host = match.host_tokens - match.device_tokens
            overlap = match.device_tokens + self.HOST_CREDIT * on_host
            prefill = max(0.0, one.pending_tokens + prompt.num_tokens - overlap)
            return prefill + one.kv_tokens + prompt.num_tokens

        return least(score, cluster, self.rng)


class LlmdPolicy(Rule):
    """llm-d's scorers: the matched share, free KV memory and the queue, each times a weight."""

    knowledge: Knowledge = "events"
    HOST_CREDIT = 0.8
    WEIGHTS = (2.0, 1.0, 1.0)

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The highest score; then at random."""
        queues = [one.num_pending for one in cluster.replicas]
        low, high = min(queues), max(queues)
        by_match, by_memory, by_queue = self.WEIGHTS

        def score(one: ReplicaView) -> float:
            match = prompt.match(one.replica_id)
            on_host = match.host_tokens - match.device_tokens
            matched = (match.device_tokens + self.HOST_CREDIT * on_host) / prompt.num_tokens
            used = one.running_kv_tokens / one.kv_capacity_tokens if one.kv_capacity_tokens else 0
            queue = (high - one.num_pending) / (high - low) if high > low else 1.0
            return -(by_match * matched + by_memory * (1 - min(1.0, used)) + by_queue * queue)

        return least(score, cluster, self.rng)


class LlmdChartPolicy(LlmdPolicy):
    """llm-d with the weights of its chart."""

    WEIGHTS = (3.0, 2.0, 2.0)


class ConductorPolicy(Rule):
    """Mooncake's Conductor: queue, transfer of a much longer prefix from elsewhere, prefill."""

    knowledge: Knowledge = "events"
    TRANSFER_RATIO = 2.0

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The smallest sum; then at random."""

        def score(one: ReplicaView) -> float:
            return self._seconds(prompt, one, cluster.now_s)

        return least(score, cluster, self.rng)

    def _seconds(self, prompt: PromptView, one: ReplicaView, now_s: float) -> float:
        match, speeds = prompt.match(one.replica_id), self.cost.speeds
        own = match.host_tokens
        transfer_s = (own - match.device_tokens) * speeds.host_token_s
        if prompt.shared_tokens > self.TRANSFER_RATIO * own:
            transfer_s += (prompt.shared_tokens - own) * speeds.store_token_s
            own = prompt.shared_tokens
        return (
            self.cost.wait_s(one, now_s)
            + transfer_s
            + speeds.prefill_s(prompt.num_tokens - own, own)
        )


def least(
    score: Callable[[ReplicaView], float], cluster: ClusterView, rng: random.Random
) -> ReplicaView:
    """The replica of the smallest score; of several, any."""
    scores = [score(one) for one in cluster.replicas]
    best = min(scores)
    return rng.choice(
        [one for one, value in zip(cluster.replicas, scores, strict=True) if value == best]
    )


def _device(prompt: PromptView, replica: ReplicaView) -> int:
    return prompt.match(replica.replica_id).device_tokens
