"""FlashInfer's kernels for the embedded engine: the one door to that library.

They are compiled when first used, some minutes in all, and kept by FlashInfer for the next start;
`flashinfer-jit-cache` brings them ready made.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from actors.engines.torch.cuda.inputs import DeviceInputs
from actors.engines.torch.pool import PagedPool
from actors.engines.torch.to_device import send

logger = logging.getLogger(__name__)

try:
    import flashinfer
except ImportError:
    flashinfer = None

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
WORKSPACE_BYTES = 256 << 20
PLANNED_BYTES, PLANNED_BYTES_PER_TOKEN = 64 << 10, 64
"""Room for what is planned of a captured pass: some 20 bytes a token, and a part that is fixed."""

LONG_QUERY = 256
"""From so many new tokens of one sequence on, the kernel for long prompts pays: it splits queries
over the device, the other one contexts."""


def is_installed() -> bool:
    """Whether FlashInfer can be imported."""
    return flashinfer is not None


class FlashInferKernels:
    """Implements `cuda.fused.Kernels`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`."""
        normed: torch.Tensor = flashinfer.rmsnorm(x, weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """See `Kernels.add_rms_norm`."""
        flashinfer.fused_add_rmsnorm(x, residual, weight, eps)

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, table: torch.Tensor
    ) -> None:
        """See `Kernels.rotate`."""
        flashinfer.apply_rope_with_cos_sin_cache_inplace(
            positions, query.flatten(1), key.flatten(1), query.shape[-1], table
        )

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_and_mul`."""
        product: torch.Tensor = flashinfer.silu_and_mul(x)
        return product


class FlashInferAttention:
    """Implements `cuda.fused.PoolAttention`: plan a pass, then attend in every layer.

    With `fixed` inputs its size never changes, so that a CUDA graph can replay it; the first plan
    is then of the largest pass. All kernels run on the current stream; `workspace` may be shared by
    passes that run one after the other.
    """

    def __init__(
        self,
        pool: PagedPool,
        num_heads: int,
        workspace: torch.Tensor,
        fixed: DeviceInputs | None = None,
    ) -> None:
        self._layout = pool.layout
        self._num_heads = num_heads
        self._layers = [pool.with_scratch[:, layer] for layer in range(pool.layout.num_layers)]
        self._workspace = workspace
        self._fixed = fixed
        self._wrappers: dict[str, Any] = {}
        self._beside: _PlannedBeside | None = None
        self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def plan(self, host: DeviceInputs, inputs: DeviceInputs) -> None:
        """Prepare the next pass: its numbers in pinned memory, and in the device's memory.

        The wrapper copies page ids that are not on the device only when the pass that is running
        has ended, and other numbers that are not pinned perhaps, too.
        """
        longest = int(host.query_starts.diff().max())
        self._wrapper = self._wrapper_for(longest)
        self._inputs = inputs
        self._planned.synchronize()  # the wrapper's host memory is used again
        plan = partial(self._plan, host, inputs, longest)
        if self._beside is not None:
            self._beside.plan(plan)
        else:
            plan(self._wrapper)
            if self._fixed is not None:
                self._beside = _PlannedBeside(self._wrapper, self._workspace, self._fixed, plan)
        self._planned.record()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `PoolAttention.attend`."""
        inputs, pages = self._inputs, self._layers[layer]
        flashinfer.append_paged_kv_cache(
            key,
            value,
            inputs.token_sequences,
            inputs.positions,
            pages,
            inputs.page_ids,
            inputs.page_starts,
            inputs.last_page_tokens,
            kv_layout="HND",
        )
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._wrapper.run(query, pages, out=output)
        return output

    def _plan(self, host: DeviceInputs, inputs: DeviceInputs, longest: int, wrapper: Any) -> None:
        layout = self._layout
        wrapper.plan(
            host.query_starts,
            host.page_starts,
            inputs.page_ids[: len(host.page_ids)],
            host.last_page_tokens,
            self._num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            layout.tokens_per_block,
            causal=True,
            q_data_type=self._layers[0].dtype,
            max_token_per_sequence=longest,
        )

    def _wrapper_for(self, longest: int) -> Any:
        backend = "auto" if self._fixed is None and longest >= LONG_QUERY else "fa2"
        if backend not in self._wrappers:
            self._wrappers[backend] = _wrapper(self._workspace, backend, self._fixed)
        return self._wrappers[backend]


class _PlannedBeside:
    """Plans for a captured pass that no copy engine is needed for.

    A wrapper copies what it has planned to the device on the current stream; where a prefix is
    being loaded that takes as long as the load, and the pass waits for it. So another wrapper of
    the same size plans on a stream of its own, for which nobody waits, into memory that nobody
    reads; and what it planned is sent from its host memory to where the graph looks for it.
    """

    def __init__(
        self,
        captured: Any,
        workspace: torch.Tensor,
        fixed: DeviceInputs,
        plan: Callable[[Any], None],
    ) -> None:
        """`captured` has its first `plan`, which is of the largest pass, and runs in the graph."""
        unused = DeviceInputs(*(torch.empty_like(getattr(fixed, one)) for one in fixed.__slots__))
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._planner = _wrapper(workspace, "fa2", unused)
        self._to = captured._int_workspace_buffer
        with torch.cuda.stream(self._stream):
            plan(self._planner)
        self._from = self._planner._pin_memory_int_workspace_buffer

    def plan(self, plan: Callable[[Any], None]) -> None:
        """As `plan(captured)`, when the last one is on the device."""
        with torch.cuda.stream(self._stream):
            plan(self._planner)
        send(self._from, self._to)


def _wrapper(workspace: torch.Tensor, backend: str, fixed: DeviceInputs | None) -> Any:
    buffers: dict[str, Any] = {}
    if fixed is not None:
        buffers = {
            "use_cuda_graph": True,
            "qo_indptr_buf": fixed.query_starts,
            "paged_kv_indptr_buf": fixed.page_starts,
            "paged_kv_indices_buf": fixed.page_ids,
            "paged_kv_last_page_len_buf": fixed.last_page_tokens,
        }
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace, "HND", backend=backend, **buffers
    )
    if fixed is not None:
        num_bytes = PLANNED_BYTES + PLANNED_BYTES_PER_TOKEN * len(fixed.token_ids)
        planned = torch.empty(num_bytes, dtype=torch.uint8, device=workspace.device)
        wrapper.reset_workspace_buffer(workspace, planned)
    return wrapper
