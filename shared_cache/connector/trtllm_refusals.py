"""What TensorRT-LLM must not do while this connector is on, each with the way out.

Upstream refuses some of it, in some versions. What it lets pass (a host cache of its own, attention
data parallelism, beams, hybrid caches) corrupts blocks without an error anywhere, so all of it is
refused here, in every version. Pure.
"""

from collections.abc import Callable, Mapping
from typing import Any

from shared_cache.connector.trtllm_values import read, text

Refusal = Callable[[Any, Mapping[str, str]], "str | None"]
"""Says what is wrong with engine settings and environment, and the fix; None: nothing."""


def problems_of(llm_args: Any, environment: Mapping[str, str]) -> list[str]:
    """Everything in an engine's settings that excludes the connector; empty: nothing does."""
    found = (refusal(llm_args, environment) for refusal in _REFUSALS)
    return [problem for problem in found if problem]


def warnings_of(llm_args: Any) -> list[str]:
    """Settings that cost hits, but no correctness."""
    found = []
    if read(llm_args, "kv_cache_config.enable_partial_reuse", False):
        found.append(
            "kv_cache_config.enable_partial_reuse is on: requests that the engine matches in the "
            "middle of a block load nothing from the cache; set it to false"
        )
    if read(llm_args, "cache_transceiver_config.backend"):
        found.append(
            "cache_transceiver_config is set: prefill engines may use the cache, and requests that "
            "only generate end with an error of TensorRT-LLM; give decode engines no connector"
        )
    return found


def foreign_weights(llm_args: Any) -> list[str]:
    """Settings by which the engine's weights are not those of the model's files.

    `dummy` is not among them: it is told in the name of the namespace. Others that upstream has
    had: VISION_ONLY, GMS (memory of another process), PRESHARDED (from another engine).
    """
    found = []
    load_format = text(read(llm_args, "load_format")) or "auto"
    if load_format.lower() not in ("auto", "dummy"):
        found.append(f"load_format is {load_format}: weights come from elsewhere")
    extension = read(llm_args, "ray_worker_extension_cls")
    if extension:
        found.append(f"ray_worker_extension_cls is {extension}: weights change while it runs")
    return found


def _backend(args: Any, environment: Mapping[str, str]) -> str | None:
    backend = text(read(args, "backend", "pytorch"))
    if backend == "pytorch":
        return None
    return f"backend {backend!r} has no connectors: use TensorRT-LLM's PyTorch backend"


def _parallelism(args: Any, environment: Mapping[str, str]) -> str | None:
    for name in ("pipeline_parallel_size", "context_parallel_size"):
        if read(args, name, 1) > 1:
            return (
                f"{name} is {read(args, name)}: each rank then holds another part of a block, and "
                "they do not compute in step; set it to 1 and use tensor_parallel_size"
            )
    return None


def _one_node(args: Any, environment: Mapping[str, str]) -> str | None:
    tp_size, on_node = read(args, "tensor_parallel_size", 1), read(args, "gpus_per_node")
    if on_node is None or tp_size <= on_node:
        return None
    return (
        f"tensor_parallel_size {tp_size} needs more than one node of {on_node} GPUs, and ranks "
        f"share blocks through the memory of one; lower it to at most {on_node}"
    )


def _ray(args: Any, environment: Mapping[str, str]) -> str | None:
    if text(read(args, "orchestrator_type")) != "ray" or read(args, "tensor_parallel_size", 1) < 2:
        return None
    return (
        "orchestrator_type 'ray' with tensor_parallel_size above 1: TensorRT-LLM tells the other "
        "ranks of the connector's answers through MPI, which Ray's workers lack; leave "
        "orchestrator_type unset"
    )


def _attention_dp(args: Any, environment: Mapping[str, str]) -> str | None:
    if not read(args, "enable_attention_dp", False):
        return None
    return (
        "enable_attention_dp is on: every rank then has requests of its own, and the connector is "
        "asked about those of one; set it to false"
    )


def _beams(args: Any, environment: Mapping[str, str]) -> str | None:
    if read(args, "max_beam_width", 1) <= 1:
        return None
    return (
        f"max_beam_width is {read(args, 'max_beam_width')}: a request with beams has several lists "
        "of blocks; set it to 1"
    )


def _speculation(args: Any, environment: Mapping[str, str]) -> str | None:
    if read(args, "speculative_config") is None:
        return None
    return (
        "speculative_config is set: TensorRT-LLM 1.2 refuses it beside a connector, and later "
        "versions take back blocks that the connector was told of; remove speculative_config, or "
        "remove kv_connector_config"
    )


def _block_reuse(args: Any, environment: Mapping[str, str]) -> str | None:
    if environment.get("FORCE_DETERMINISTIC", "0") == "1":
        return (
            "FORCE_DETERMINISTIC=1 switches the reuse of blocks off, so nothing would ever be "
            "loaded; unset it"
        )
    if read(args, "kv_cache_config.enable_block_reuse", True):
        return None
    return (
        "kv_cache_config.enable_block_reuse is off, so nothing would ever be loaded; set it to "
        "true. If it is: attn_backend FLASHINFER and MLA models on some GPUs switch it off"
    )


def _partial_reuse(args: Any, environment: Mapping[str, str]) -> str | None:
    kv = "kv_cache_config"
    copies = read(args, f"{kv}.copy_on_partial_reuse", True)
    if not (read(args, f"{kv}.enable_partial_reuse", False) and copies):
        return None
    return (
        f"{kv}.enable_partial_reuse is on: TensorRT-LLM then copies parts of blocks into free ones "
        "at any time, also into those that are still being saved; set it to false"
    )


def _host_cache(args: Any, environment: Mapping[str, str]) -> str | None:
    for name in ("host_cache_size", "disk_cache_size"):
        if read(args, f"kv_cache_config.{name}", 0):
            return (
                f"kv_cache_config.{name} is set: with a cache tier of its own TensorRT-LLM moves "
                "blocks to other places of the pool than their numbers say; remove it, and set "
                "host.bytes in the connector's YAML instead"
            )
    return None


def _windows(args: Any, environment: Mapping[str, str]) -> str | None:
    windows = read(args, "kv_cache_config.max_attention_window")
    if not windows:
        return None
    if len(set(windows)) > 1:
        return (
            f"kv_cache_config.max_attention_window has several sizes ({sorted(set(windows))}), so "
            "there are several pools, and the connector is given one; remove it"
        )
    max_seq_len = read(args, "max_seq_len")
    if max_seq_len is not None and max_seq_len <= windows[0]:
        return None
    return (
        f"kv_cache_config.max_attention_window is {windows[0]}: once a request is longer than that "
        "the engine gives up its first blocks; remove it, or set max_seq_len to at most "
        f"{windows[0]}"
    )


def _sink_tokens(args: Any, environment: Mapping[str, str]) -> str | None:
    if not read(args, "kv_cache_config.sink_token_length", 0):
        return None
    return (
        "kv_cache_config.sink_token_length is set: blocks then hold other tokens than their place "
        "says; remove it"
    )


def _manager(args: Any, environment: Mapping[str, str]) -> str | None:
    chosen = read(args, "kv_cache_config.use_kv_cache_manager_v2", False)
    if chosen is False:
        return None
    return (
        f"kv_cache_config.use_kv_cache_manager_v2 is {chosen!r}: this connector knows the blocks "
        "of the first manager only; set it to false. Newer versions of TensorRT-LLM say 'auto' "
        "where nobody sets it, and may then take the second one"
    )


def _attention(args: Any, environment: Mapping[str, str]) -> str | None:
    backend = text(read(args, "attn_backend", "TRTLLM"))
    if backend is not None and backend.upper() == "TRTLLM":
        return None
    return (
        f"attn_backend {backend}: it reuses no blocks (FLASHINFER) or makes them of another size "
        "(VANILLA: max_num_tokens); use TRTLLM"
    )


def _sparse_attention(args: Any, environment: Mapping[str, str]) -> str | None:
    if read(args, "sparse_attention_config") is None:
        return None
    return (
        "sparse_attention_config is set: it keeps a second cache, which TensorRT-LLM does not hand "
        "to connectors; remove it, or remove kv_connector_config"
    )


def _policy(args: Any, environment: Mapping[str, str]) -> str | None:
    policy = text(read(args, "scheduler_config.capacity_scheduler_policy", "GUARANTEED_NO_EVICT"))
    if policy == "GUARANTEED_NO_EVICT":
        return None
    return (
        f"scheduler_config.capacity_scheduler_policy {policy} takes blocks from running requests; "
        "use GUARANTEED_NO_EVICT"
    )


def _encoder_only(args: Any, environment: Mapping[str, str]) -> str | None:
    if not read(args, "mm_encoder_only", False):
        return None
    return "mm_encoder_only is on: such an engine has no KV cache; remove kv_connector_config"


_REFUSALS: tuple[Refusal, ...] = (
    _backend,
    _parallelism,
    _one_node,
    _ray,
    _attention_dp,
    _beams,
    _speculation,
    _block_reuse,
    _partial_reuse,
    _host_cache,
    _windows,
    _sink_tokens,
    _manager,
    _attention,
    _sparse_attention,
    _policy,
    _encoder_only,
)
