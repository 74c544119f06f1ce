"""The fused decoder's kernels and attention in plain torch, to compare it without a GPU."""

import torch
from torch.nn import functional

from actors.engines.torch.attention import PagedPass


class ReferenceKernels:
    """Implements `actors.engines.torch.cuda.fused.Kernels` in the obvious way."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        residual.add_(x)
        x.copy_(self.rms_norm(residual, weight, eps))

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, table: torch.Tensor
    ) -> None:
        cosines, sines = table[positions][:, None].chunk(2, dim=-1)
        for x in (query, key):
            first, second = x.float().chunk(2, dim=-1)
            rotated = (first * cosines - second * sines, second * cosines + first * sines)
            x.copy_(torch.cat(rotated, dim=-1))

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class GatheringAttention:
    """Implements `PoolAttention` by the pass that the plain engine uses."""

    def __init__(self, paged: PagedPass, scale: float) -> None:
        self._paged = paged
        self._scale = scale

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        packed = (one.transpose(0, 1)[None] for one in (query, key, value))
        return self._paged.attend(layer, *packed, self._scale)[0]
