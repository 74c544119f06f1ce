"""The rules of other routers that look at load alone, to compare with and to choose by name."""

import hashlib
import random
from collections.abc import Sequence

from actors.routing.cost import CostModel
from actors.routing.policies import Knowledge
from actors.routing.views import ClusterView, PromptView, ReplicaView


def fewest_outstanding(replicas: Sequence[ReplicaView], rng: random.Random) -> ReplicaView:
    """The replica with the fewest requests; of several, any."""
    fewest = min(one.num_outstanding for one in replicas)
    return rng.choice([one for one in replicas if one.num_outstanding == fewest])


class Rule:
    """What the rules of others have in common: predictions to use, and dice."""

    knowledge: Knowledge = "nothing"

    def __init__(self, cost: CostModel, rng: random.Random) -> None:
        self.cost = cost
        self.rng = rng


class RandomPolicy(Rule):
    """Any replica, evenly."""

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """Any of them."""
        return self.rng.choice(cluster.replicas)


class RoundRobinPolicy(Rule):
    """Each replica in its turn, by name; one that joins or leaves does not restart the round."""

    _last = ""

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The next name after the one chosen last, else the first."""
        later = [one for one in cluster.replicas if one.replica_id > self._last]
        chosen = min(later or cluster.replicas, key=lambda one: one.replica_id)
        self._last = chosen.replica_id
        return chosen


class LeastOutstandingPolicy(Rule):
    """The replica with the fewest requests, whatever is cached where."""

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The fewest outstanding; then at random."""
        return fewest_outstanding(cluster.replicas, self.rng)


class PowerOfTwoPolicy(Rule):
    """The shorter queue of two random replicas: Ray Serve's default."""

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The better of two; the only one when there is one."""
        two = self.rng.sample(cluster.replicas, min(2, len(cluster.replicas)))
        return min(two, key=lambda one: one.num_outstanding)


class SessionHashPolicy(Rule):
    """Each session to a replica of its own, unless that has much more than its share.

    Rendezvous hashing, so that a replica that leaves moves its own sessions only. A prompt without
    a session goes where the fewest requests are.
    """

    BOUND = 1.25

    def choose(self, prompt: PromptView, cluster: ClusterView) -> ReplicaView:
        """The session's first choice within the bound, else the fewest outstanding."""
        if prompt.session is not None:
            most = 1 + sum(one.num_outstanding for one in cluster.replicas)
            bound = self.BOUND * most / len(cluster.replicas)
            first = max(cluster.replicas, key=lambda one: _weight(prompt.session, one.replica_id))
            if first.num_outstanding < bound:
                return first
        return fewest_outstanding(cluster.replicas, self.rng)


def _weight(session: str | None, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{session} {replica_id}".encode(), digest_size=8).digest()
