"""Why a staged prefix ends where it ends, as the fetch that brought it knows. Pure.

Asked later, a store would say something else: the request that missed a block stores it then.
"""

from typing import Literal

Shortfall = Literal[
    "not_stored", "cost_gate", "deadline", "unreadable", "no_room", "tier_in_trouble"
]
"""No tier had the block; computing it was predicted to be sooner; it did not come in time; the
store named it and gave no good block (corrupt, gone, failed); host memory was full of what is in
use; no tier could be asked after earlier faults."""
