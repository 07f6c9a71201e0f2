"""The sizes of the blocks that the kernels work on."""

from typing import Any

import triton


def block_rank(rank: int) -> int:
    """The rank, rounded up to what `tl.dot` takes: a power of 2, and at least 16."""
    return max(16, triton.next_power_of_2(rank))


def choices(blocks: list[tuple[dict[str, Any], int]]) -> list[triton.Config]:
    """
    What `triton.autotune` picks the fastest of, from sizes of blocks and numbers of warps. The interpreter times
    nothing, and takes the first.
    """
    configs = [triton.Config(sizes, num_warps=warps) for sizes, warps in blocks]
    return configs[:1] if triton.knobs.runtime.interpret else configs
