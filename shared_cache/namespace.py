"""Namespace: everything besides tokens that decides what a block's bytes mean.

Bytes from another model, dtype, layout or shard are not "almost right", they are garbage that an
engine would happily attend to. So all of it goes into one fingerprint, the fingerprint into the
place where blocks are stored and into every stored object, and a difference is a miss.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 2
"""Version of the stored object; readers treat every other version as a miss."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The shape of one block: `[num_layers, kv_factor, num_kv_heads, tokens_per_block, head_dim]`.

    This is one row of a block-first pool, as in TensorRT-LLM (its KvCacheManager pool with the last
    axes flattened). `kv_factor` is 2, or 1 for caches without values (MLA). `num_kv_heads` counts
    the heads of this shard.
    """

    num_layers: int
    kv_factor: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ValueError(f"unknown KV dtype {self.dtype!r}; known are {known}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The axes of one block, outermost first."""
        return (
            self.num_layers,
            self.kv_factor,
            self.num_kv_heads,
            self.tokens_per_block,
            self.head_dim,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        elements = 1
        for axis in self.shape:
            elements *= axis
        return elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything besides tokens that decides what a block's bytes mean.

    `model` and `revision` name the weights (`revision` is a digest, not a branch), `quantization`
    how they are computed, `engine` the kind of engine that owns the pool layout.
    """

    model: str
    revision: str
    engine: str
    layout: BlockLayout
    quantization: str = "none"
    tp_rank: int = 0
    tp_size: int = 1
    format_version: int = FORMAT_VERSION

    def differences(self, other: "Namespace") -> dict[str, tuple[Any, Any]]:
        """The fields that differ, by name, each with this value and the other one."""
        ours, theirs = self._flat(), other._flat()
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    def _flat(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields.pop("layout"), **fields}

    def to_json(self) -> str:
        """The canonical text that is fingerprinted and kept in every stored object."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Namespace":
        """The inverse of `to_json`; raises `ValueError` on anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**{**fields, "layout": BlockLayout(**fields["layout"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a namespace: {text[:200]!r}") from error

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ when any field differs; part of object names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]
