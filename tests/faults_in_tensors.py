"""Calls an operator with tensors that break its rules, and once with tensors that keep them; prints what it says.

tests/test_sim_memory.py runs it on the test bed.
"""

from __future__ import annotations

import json

import torch

from dgemma_ext.ops.block_attention import append_to_cache

SLOTS, CAPACITY, ROWS, HEADS, HEAD_DIM = 3, 8, 4, 1, 64


def append(slots: list[int], bytes_less: int = 0, prefix_length: int = 0) -> str:
    """What the operator says of two requests that append to these slots, where the cache's last bytes are missing."""
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(2, ROWS, HEADS, HEAD_DIM, generator=generator).bfloat16()
    cache = torch.zeros(2, SLOTS, CAPACITY, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    prefix_key, prefix_value = cache[0].clone(), cache[1].clone()
    if bytes_less:
        storage = prefix_key.untyped_storage()
        storage.resize_(storage.nbytes() - bytes_less)
    slot = torch.tensor(slots, dtype=torch.int32)
    before = torch.full((SLOTS,), prefix_length, dtype=torch.int32)[:2]
    try:
        append_to_cache(key, key, prefix_key, prefix_value, slot, before)
    except RuntimeError as error:
        return str(error)
    for request, place in enumerate(slots):
        assert torch.equal(prefix_key[place, prefix_length : prefix_length + ROWS], key[request])
    return ""


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "right": append([2, 0], prefix_length=CAPACITY - ROWS),
                "short": append([2, 0], 16, prefix_length=CAPACITY - ROWS),
                "the same slot": append([1, 1]),
            }
        )
    )
