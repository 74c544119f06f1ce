"""A pass's numbers in the device's memory, brought there together.

Each small tensor of its own would cost a launch; on a slow host a decoding step would wait longer
for its inputs than for some of its kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.engines.torch.batch import PageTables


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """Views of one int32 tensor; the fields are those of `PackedBatch` and of `PageTables`."""

    token_ids: torch.Tensor
    chosen_rows: torch.Tensor
    token_sequences: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    page_starts: torch.Tensor
    last_page_tokens: torch.Tensor
    page_ids: torch.Tensor


def host_inputs(
    token_ids: Sequence[int], tables: PageTables, chosen_rows: Sequence[int] = ()
) -> torch.Tensor:
    """All numbers of a pass in pinned memory; missing tokens of a padded pass are token 0."""
    num_tokens = len(tables.positions)
    parts = (
        np.asarray(token_ids, np.int32),
        np.zeros(num_tokens - len(token_ids), np.int32),
        np.asarray(chosen_rows, np.int32),
        np.full(num_tokens - len(chosen_rows), -1, np.int32),
        tables.token_sequences,
        tables.positions,
        tables.query_starts,
        tables.page_starts,
        tables.last_page_tokens,
        tables.page_ids,
    )
    total = sum(map(len, parts))
    host = torch.empty(total, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    np.concatenate(parts, out=host.numpy())
    return host


def split_inputs(packed: torch.Tensor, num_tokens: int, num_sequences: int) -> DeviceInputs:
    """The views of what `host_inputs` packed; the page ids are all that follows the rest."""
    sizes = [num_tokens] * 4 + [num_sequences + 1] * 2 + [num_sequences]
    return DeviceInputs(*torch.split(packed, [*sizes, len(packed) - sum(sizes)]))
