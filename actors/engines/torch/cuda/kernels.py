"""FlashInfer's kernels for the embedded engine: the one door to that library.

They are compiled when first used, some minutes in all, and kept by FlashInfer for the next start;
`flashinfer-jit-cache` brings them ready made.
"""

import logging
from typing import Any

import torch

from actors.engines.torch.cuda.inputs import DeviceInputs
from actors.engines.torch.pool import PagedPool

logger = logging.getLogger(__name__)

try:
    import flashinfer
except ImportError:
    flashinfer = None

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
WORKSPACE_BYTES = 256 << 20
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

    With `fixed` inputs its size never changes, so that a CUDA graph can replay it. All kernels run
    on the current stream; `workspace` may be shared by passes that run one after the other.
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
        self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def plan(self, host: DeviceInputs, inputs: DeviceInputs) -> None:
        """Prepare the next pass: its numbers in pinned memory, and in the device's memory.

        The wrapper copies page ids that are not on the device only when the pass that is running
        has ended, and other numbers that are not pinned perhaps, too. With fixed inputs its page
        ids are `inputs` themselves, so it is given none: a copy from the device to itself would
        stand in line behind a prefix that is being loaded.
        """
        layout = self._layout
        longest = int(host.query_starts.diff().max())
        self._wrapper = self._wrapper_for(longest)
        self._inputs = inputs
        self._planned.synchronize()  # the wrapper's host memory is used again
        self._wrapper.plan(
            host.query_starts,
            host.page_starts,
            inputs.page_ids[: len(host.page_ids) if self._fixed is None else 0],
            host.last_page_tokens,
            self._num_heads,
            layout.num_kv_heads,
            layout.head_dim,
            layout.tokens_per_block,
            causal=True,
            q_data_type=self._layers[0].dtype,
            max_token_per_sequence=longest,
        )
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

    def _wrapper_for(self, longest: int) -> Any:
        backend = "auto" if self._fixed is None and longest >= LONG_QUERY else "fa2"
        if backend not in self._wrappers:
            self._wrappers[backend] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "HND", backend=backend, **self._fixed_buffers()
            )
        return self._wrappers[backend]

    def _fixed_buffers(self) -> dict[str, Any]:
        if self._fixed is None:
            return {}
        return {
            "use_cuda_graph": True,
            "qo_indptr_buf": self._fixed.query_starts,
            "paged_kv_indptr_buf": self._fixed.page_starts,
            "paged_kv_indices_buf": self._fixed.page_ids,
            "paged_kv_last_page_len_buf": self._fixed.last_page_tokens,
        }
