"""A Llama-family decoder in few kernels: packed projections, fused norms, positions in place.

Transformers' own layers take some forty launches each; on a host that launches slowly a short pass
takes the time of its launches, and in a long one the element-wise kernels between the large ones
read and write every activation again. Weights stay transformers': they are packed side by side once
and the modules' own parameters become views, so nothing is held twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from actors.engines.torch.batch import NO_HOOKS, LayerHooks


class Kernels(Protocol):
    """Element-wise steps of a layer; rows are tokens. `x` is `[total, size]`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x` over its root mean square, times `weight`, row by row."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """Add `x` to `residual`, and make `x` the norm of the sum; both in place."""

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, table: torch.Tensor
    ) -> None:
        """Rotary positions in place on `[total, heads, head_dim]`; rows of `table` are positions,
        each the cosines and then the sines of its angles, in float32.
        """

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half of each row, times the second."""


class PoolAttention(Protocol):
    """Attention of one planned pass."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write K and V to the pool, attend over it: `[total, heads, head_dim]`, as `query` is.

        K and V are `[total, kv_heads, head_dim]`; rows of all three may be strided.
        """


@dataclass(frozen=True, slots=True)
class _Linear:
    """Projections of the same input, side by side."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: _Norm
    qkv: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    is_rotated: bool
    out: _Linear
    before_mlp: _Norm
    gate_up: _Linear
    down: _Linear


class FusedDecoder:
    """The decoder of a transformers network of the families that `model.py` accepts.

    `max_positions` bounds the positions that it can be given. Its result is the network's, up to
    rounding: the kernels keep sums in float32 where the modules round in between.
    """

    def __init__(self, network: Any, kernels: Kernels, max_positions: int) -> None:
        config, model = network.config, network.model
        self._kernels = kernels
        self._embedding: torch.Tensor = model.embed_tokens.weight
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_dim: int = model.layers[0].self_attn.head_dim
        self._layers = [_pack_layer(layer) for layer in model.layers]
        self._final_norm = _norm(model.norm)
        self._rotary_table = _rotary_table(model, max_positions)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self._num_heads

    def hidden(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: PoolAttention,
        hooks: LayerHooks = NO_HOOKS,
    ) -> torch.Tensor:
        """What the last layer makes of a packed row of tokens, normalised: `[total, hidden]`."""
        kernels = self._kernels
        residual = functional.embedding(token_ids, self._embedding)
        first = self._layers[0].before_attention
        x = kernels.rms_norm(residual, first.weight, first.eps)
        for index, layer in enumerate(self._layers):
            if index:
                self._add_norm(x, residual, layer.before_attention)
            hooks.before(index)
            x = layer.out(self._attend(index, layer, x, positions, attention))
            hooks.after(index)
            self._add_norm(x, residual, layer.before_mlp)
            x = layer.down(kernels.silu_and_mul(layer.gate_up(x)))
        self._add_norm(x, residual, self._final_norm)
        return x

    def _add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: _Norm) -> None:
        self._kernels.add_rms_norm(x, residual, norm.weight, norm.eps)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        positions: torch.Tensor,
        attention: PoolAttention,
    ) -> torch.Tensor:
        heads, kv_heads = self._num_heads, self._num_kv_heads
        projected = layer.qkv(x).view(len(x), heads + 2 * kv_heads, self._head_dim)
        query, key, value = torch.split(projected, [heads, kv_heads, kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = (
                self._norm_heads(query, layer.query_norm),
                self._norm_heads(key, layer.key_norm),
            )
        if layer.is_rotated:
            self._kernels.rotate(positions, query, key, self._rotary_table)
        return attention.attend(index, query, key, value).view(len(x), -1)

    def _norm_heads(self, x: torch.Tensor, norm: _Norm) -> torch.Tensor:
        rows = x.reshape(-1, self._head_dim)
        return self._kernels.rms_norm(rows, norm.weight, norm.eps).view(x.shape)


def _pack_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before_attention=_norm(layer.input_layernorm),
        qkv=_pack((attention.q_proj, attention.k_proj, attention.v_proj)),
        query_norm=_optional_norm(attention, "q_norm"),
        key_norm=_optional_norm(attention, "k_norm"),
        is_rotated=bool(getattr(attention, "use_rope", True)),
        out=_Linear(attention.o_proj.weight, attention.o_proj.bias),
        before_mlp=_norm(layer.post_attention_layernorm),
        gate_up=_pack((mlp.gate_proj, mlp.up_proj)),
        down=_Linear(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _pack(projections: Sequence[torch.nn.Linear]) -> _Linear:
    """One matrix of several; their own parameters become views of it."""
    weight = torch.cat([one.weight for one in projections])
    biases = [one.bias for one in projections]
    bias = None
    if any(one is not None for one in biases):
        bias = torch.cat(
            [
                weight.new_zeros(projection.out_features) if one is None else one
                for projection, one in zip(projections, biases, strict=True)
            ]
        )
    start = 0
    for projection in projections:
        projection.weight.data = weight[start : start + projection.out_features]
        start += projection.out_features
    return _Linear(weight, bias)


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _optional_norm(attention: Any, name: str) -> _Norm | None:
    module = getattr(attention, name, None)
    return None if module is None else _norm(module)


def _rotary_table(model: Any, max_positions: int) -> torch.Tensor:
    """`[max_positions, head_dim]`: the model's own cosines and sines, half of each row."""
    device = model.embed_tokens.weight.device
    positions = torch.arange(max_positions, device=device)[None]
    cosines, sines = model.rotary_emb(
        torch.zeros((), dtype=torch.float32, device=device), positions
    )
    half = cosines.shape[-1] // 2
    table = torch.cat((cosines[0, :, :half], sines[0, :, :half]), dim=-1)
    return table.float().contiguous()
