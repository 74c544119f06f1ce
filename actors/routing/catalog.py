"""Policies by name: ours, and the rules of other routers to compare with."""

import random
from collections.abc import Callable
from typing import Literal, get_args

from actors.routing import prefix_rivals, rivals
from actors.routing.cost import CostModel
from actors.routing.policies import LeastCostPolicy, Policy

PolicyName = Literal[
    "least_cost",
    "random",
    "round_robin",
    "least_outstanding",
    "power_of_two",
    "session_hash",
    "prefix_first",
    "sglang",
    "sglang_lmetric",
    "llm_d",
    "llm_d_chart",
    "dynamo",
    "conductor",
]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

_MAKERS: dict[str, Callable[[CostModel, random.Random], Policy]] = {
    "least_cost": LeastCostPolicy,
    "random": rivals.RandomPolicy,
    "round_robin": rivals.RoundRobinPolicy,
    "least_outstanding": rivals.LeastOutstandingPolicy,
    "power_of_two": rivals.PowerOfTwoPolicy,
    "session_hash": rivals.SessionHashPolicy,
    "prefix_first": prefix_rivals.PrefixFirstPolicy,
    "sglang": prefix_rivals.SglangPolicy,
    "sglang_lmetric": prefix_rivals.LmetricPolicy,
    "llm_d": prefix_rivals.LlmdPolicy,
    "llm_d_chart": prefix_rivals.LlmdChartPolicy,
    "dynamo": prefix_rivals.DynamoPolicy,
    "conductor": prefix_rivals.ConductorPolicy,
}


def make_policy(name: str, cost: CostModel, rng: random.Random) -> Policy:
    """The policy called `name` (one of `POLICY_NAMES`); another name raises `KeyError`."""
    return _MAKERS[name](cost, rng)
