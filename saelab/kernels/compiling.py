"""The compilation of the CPU kernels: whom to tell before it, and how to have it behind oneself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saelab.kernels import ops
from saelab.kernels.cases import random_case
from saelab.kernels.dispatch import obstacle, use_backend

_tell: list[Callable[[], None]] = []


def tell_before(tell: Callable[[], None]) -> None:
    """Call ``tell`` before the first kernel of this process is compiled; kernels that numba finds on disk are not."""
    _tell[:] = [tell]


def about_to_compile() -> None:
    """A kernel is about to be compiled: tell whoever asked, once."""
    while _tell:
        _tell.pop()()


def warm_up() -> bool:
    """Run every CPU kernel once, so that all are compiled and on disk; False where numba does not run them."""
    if obstacle("numba"):
        return False
    with use_backend("numba"):
        for threads in {1, torch.get_num_threads()}:  # one thread runs the kernels without their drivers
            _with_threads(threads)
    return True


def _with_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, d_sae in ((8, 64), (256, 16_384)):  # the second is screened in bfloat16 where the CPU can
            _every_op(n, d_sae)
    finally:
        torch.set_num_threads(before)


def _every_op(n: int, d_sae: int) -> None:
    case = random_case(n, 16, d_sae, 4)
    x, tensors = case.x, [t.clone().requires_grad_() for t in case[1:5] if isinstance(t, torch.Tensor)]
    W_enc, b_enc, b_dec, W_dec = tensors
    for signed in (False, True):
        code = ops.select_topk(x, W_enc, b_enc, b_dec, 4, signed)
        ops.select_batch(x, W_enc, b_enc, b_dec, 4 * n, signed)
        ops.select_latent(x, W_enc, b_enc, b_dec, torch.ones(d_sae, dtype=torch.int64), signed)
        ops.select_threshold(x, W_enc, b_enc, b_dec, 3.0, signed)
        ops.select_gradient_topk(x, x, W_enc, b_enc, b_dec, W_dec, 4, 1.0, "rms", signed)
        values = ops.pre_acts_at(x, W_enc, b_enc, b_dec, code)
        sse, _ = ops.sse(x, values, code.indices, code.row_ptr, W_dec, b_dec)
        recon = ops.decode(values, code.indices, code.row_ptr, W_dec, b_dec)
        (sse.sum() + recon.sum()).backward()
    chased = ops.pursuit(x, W_dec[:64], b_dec, 3)
    chased.values.sum().backward()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ops.gather_rows(x.to(dtype), torch.arange(n), torch.empty_like(x))
