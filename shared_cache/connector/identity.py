"""What of an engine's request decides the names of its blocks, and whether tokens say it all.

Two requests that an engine would not let share must never get the same names: one would be answered
from the other's KV. Which attributes tell them apart depends on the engine's version.
"""

from collections.abc import Mapping

from shared_cache.connector.interface import ConnectorRequest
from shared_cache.hashing import ReuseScope

_NOT_TOKENS_ALONE = (
    "multimodal_hashes",
    "multimodal_positions",
    "multimodal_embedding",
    "prompt_embedding_table",
)
"""Attributes that are set where token ids do not tell all that decides a prompt's KV."""

_DUMMIES = ("is_dummy_request", "is_cuda_graph_dummy", "is_attention_dp_dummy")
"""Attributes of the requests that an engine makes up, to warm up or to fill a batch."""


def salt_by_id(cache_salt_id: int) -> str:
    """What stands for a salt whose engine gave its connector a number instead."""
    return f"cache_salt_id:{cache_salt_id}"


def reuse_scope(request: ConnectorRequest) -> ReuseScope:
    """Who may reuse this request's blocks, from the attributes that its engine has.

    The salt's number comes before the salt: every version of TensorRT-LLM has it, so who stages for
    one knows which of the two the connector takes.
    """
    salt = getattr(request, "cache_salt", None)
    salt_id = getattr(request, "cache_salt_id", None)
    lora_id = getattr(request, "lora_task_id", None)
    if salt_id is not None:
        salt = salt_by_id(salt_id)
    return ReuseScope(
        cache_salt=None if salt is None else str(salt),
        lora_id=None if lora_id is None else str(lora_id),
    )


def is_named_by_tokens(request: ConnectorRequest) -> bool:
    """Whether scope and token ids say all about a request's KV; not so for pictures and dummies."""
    if any(getattr(request, name, False) is True for name in _DUMMIES):
        return False
    given = (getattr(request, name, None) for name in _NOT_TOKENS_ALONE)
    return all(value is None or (isinstance(value, list) and not value) for value in given)


def has_media(request: ConnectorRequest) -> bool:
    """Whether Python's part of a request brings pictures, sound, or embeddings of its own.

    Models that take pictures get their positions (`mrope_config`) with text alone, too.
    """
    data = getattr(request, "py_multimodal_data", None)
    if data is None:
        return False
    return not isinstance(data, Mapping) or any(name != "mrope_config" for name in data)
