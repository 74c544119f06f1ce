"""Which replica gets a prompt: policies, their costs, bookings and the prefix index.

Pure, so that routing can be replayed from a list of events; the simulator of `benchmarks/routing`
runs these very objects.
"""

from actors.routing.bookings import Booking, Bookings
from actors.routing.catalog import POLICY_NAMES, PolicyName, make_policy
from actors.routing.cost import CostModel, CostWeights, Plan
from actors.routing.measured import FirstToken, MeasuredSpeeds, Speeds
from actors.routing.policies import Policy
from actors.routing.selector import Selector
from actors.routing.views import NO_MATCH, ClusterView, Match, PromptView, ReplicaView

__all__ = [
    "NO_MATCH",
    "POLICY_NAMES",
    "Booking",
    "Bookings",
    "ClusterView",
    "CostModel",
    "CostWeights",
    "FirstToken",
    "Match",
    "MeasuredSpeeds",
    "Plan",
    "Policy",
    "PolicyName",
    "PromptView",
    "ReplicaView",
    "Selector",
    "Speeds",
    "make_policy",
]
