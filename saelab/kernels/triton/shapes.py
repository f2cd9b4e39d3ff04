"""Tile shapes of the Triton kernels: one function each, so that what is launched is what is compiled in the tests.

Tiles are powers of two. A program has at most 16 warps: 1,024 threads, the limit of every card, where a warp has 64.
Under the interpreter one program takes many rows, since there a program costs more than a row.
"""

from __future__ import annotations

import os

INTERPRETED_ROWS = 16


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def rows_per_program(n: int, block: int) -> int:
    """On a GPU as many rows as make a tile of about 1024 elements."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return min(INTERPRETED_ROWS, power(n))
    return max(1, min(power(n), 1024 // block))


def warps(elements: int) -> int:
    """32 elements per thread at most, as far as one program can have threads."""
    return min(16, max(1, power(elements) // 1024))


def whole_shape(n: int, width: int) -> dict[str, int]:
    block = power(width)
    rows = rows_per_program(n, block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, warps(rows * block))}


def maxima_shape(n: int, n_groups: int, size: int) -> dict[str, int]:
    groups = min(power(n_groups), max(1, 2048 // size))
    return {"ROWS": rows_per_program(n, groups * size), "GROUPS": groups, "SIZE": size, "num_warps": 4}


def group_size(width: int) -> int:
    """Columns per group: 32, or more where the groups of a row would not fit one program."""
    return max(32, power(width) // 4096)


def list_shape(groups: int, size: int) -> dict[str, int]:
    """Listed groups of columns, about 1024 columns per program."""
    return {"GROUPS": min(power(groups), max(1, 1024 // size)), "SIZE": size, "num_warps": 4}


def streamed_block(width: int) -> dict[str, int]:
    return {"BLOCK": min(2048, power(width)), "num_warps": 4}


def sweep_shape() -> dict[str, int]:
    """A pass over all parameters: a few numbers per thread; under the interpreter as much as possible at once."""
    return {"BLOCK": 1 << 16 if os.environ.get("TRITON_INTERPRET") == "1" else 1024, "num_warps": 4}


def gather_shape(width: int) -> dict[str, int]:
    block = min(256, power(width))
    return {"ENTRIES": 8, "BLOCK": block, "num_warps": 4}


def entry_shape() -> dict[str, int]:
    """A row's entries in turn."""
    return {"ENTRIES": 1024, "num_warps": 4}


def token_shape(width: int) -> dict[str, int]:
    """A whole token in registers, with as many decoder rows at a time as leave room."""
    block = power(width)
    return {"ENTRIES": max(1, min(8, 8192 // block)), "BLOCK": block, "num_warps": max(4, min(16, block // 256))}


def pursuit_shape(d_sae: int, d_in: int, n_steps: int) -> dict[str, int]:
    atoms = power(d_sae)
    shape = {"STEPS": power(n_steps), "ATOMS": atoms, "BLOCK": power(d_in)}
    return {**shape, "num_warps": max(4, min(16, atoms // 512))}


def chain_shape(d_in: int) -> dict[str, int]:
    return {"BLOCK": power(d_in), "num_warps": max(4, min(16, power(d_in) // 256))}
