"""What a policy is, and that of this router: the replica whose cost is least."""

import random
from collections import OrderedDict
from math import inf
from typing import Literal, Protocol

from actors.routing.cost import SOFT_LIMIT, CostModel, Offer, queue_s
from actors.routing.views import NO_MATCH, ClusterView, Match, PromptView, ReplicaView

Knowledge = Literal["nothing", "events", "bookings", "routed"]
"""What a rule knows of caches: nothing; what caches have told; that and what is being computed for
bookings; or only where it has sent what, as if nothing were ever evicted."""

MOST_SESSIONS = 100_000
"""Sessions whose last replica is remembered, if affinity is asked for."""


class Policy(Protocol):
    """Chooses one of at least one replicas; keeps at most a small state of its own.

    `knowledge` says what the original of the rule knows, for a simulation that is fair to it; a
    real router gives every rule the best that it has.
    """

    knowledge: Knowledge

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The replica that gets the prompt."""


class LeastCostPolicy:
    """The least predicted cost; of several, any."""

    knowledge: Knowledge = "bookings"

    def __init__(self, cost: CostModel, rng: random.Random) -> None:
        self._cost = cost
        self._rng = rng
        self._homes: OrderedDict[str, str] = OrderedDict()

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The replica of the least cost, or that of the session where affinity outweighs it."""
        best = self._cheapest(prompt, cluster)
        affinity = self._cost.weights.affinity
        if not affinity or prompt.session is None:
            return best
        chosen = self._home(prompt.session, cluster) or best
        allowed_s = affinity * self._cost.speeds.work_s
        cost_s = self._cost.cost(prompt, chosen, cluster)
        if cost_s - allowed_s > self._cost.cost(prompt, best, cluster):
            chosen = best
        self._homes[prompt.session] = chosen.replica_id
        self._homes.move_to_end(prompt.session)
        if len(self._homes) > MOST_SESSIONS:
            self._homes.popitem(last=False)
        return chosen

    def _home(self, session: str, cluster: ClusterView) -> ReplicaView | None:
        home = self._homes.get(session)
        return next((one for one in cluster.replicas if one.replica_id == home), None)

    def _cheapest(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The smallest `CostModel.cost`; then at random.

        Written out, because it runs for every replica of every prompt. What depends on the match
        alone is computed once for each match, and most replicas are passed over because what they
        cost at least is more than the best so far.
        """
        model, matches, now_s = self._cost, prompt.matches, cluster.now_s
        rates = model.rates(cluster)
        doubt_s, slowing, needed = rates.doubt_s, rates.slowing, model.kv_tokens(prompt)
        offers: dict[Match, Offer] = {}
        best, ties = inf, [cluster.replicas[0]]
        for one in cluster.replicas:
            match = NO_MATCH if one.is_load_only else matches.get(one.replica_id, NO_MATCH)
            offer = offers.get(match)
            if offer is None:
                offer = offers[match] = model.offer(prompt, match, rates)
            _, fixed_s, work_s, least_s, is_settled = offer
            pending = one.num_pending
            if pending and one.floor_s + doubt_s * pending + least_s > best:
                continue
            slow = 1 + slowing * one.running_kv_tokens
            if is_settled and one.links_free_s <= now_s:
                cost = fixed_s + work_s * slow
                if cost > best:
                    continue
            else:
                cost = model.own_cost(offer, one, cluster, rates)
            if pending:
                cost += queue_s(one, slow, now_s) + doubt_s * pending
            if one.kv_tokens + needed > SOFT_LIMIT * one.kv_capacity_tokens:
                cost = model.with_memory(cost, prompt, one)
            if cost < best:
                best, ties = cost, [one]
            elif cost == best:
                ties.append(one)
        return ties[0] if len(ties) == 1 else self._rng.choice(ties)
