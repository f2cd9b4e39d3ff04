"""The compiled backend: the functions of :mod:`saelab.kernels.reference.backend` for float32 tensors on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saelab.kernels import dense
from saelab.kernels.numba import code as sparse_code
from saelab.kernels.numba import screen, select
from saelab.kernels.numba.code import by_column
from saelab.kernels.numba.launch import array, empty, launch
from saelab.kernels.numba.order import kth_largest, merge_best, pack
from saelab.kernels.numba.pursuit import pursue, pursue_backward  # noqa: F401
from saelab.kernels.numba.rows import gather_rows  # noqa: F401
from saelab.kernels.products import blocks, centred, products
from saelab.kernels.ragged import pointers
from saelab.kernels.reference.backend import Effect, Ragged

NOTHING = np.zeros((1, 1), np.float32)
UNWEIGHTED = (1.0, 0.0)
DENSE = {False: 0.3}  # share of active latents from which dense products are faster, as measured
MODES = {False: select.PLAIN, True: select.MAGNITUDE}
STAGED = 64  # entries kept ready per row where a row's number of winners is not known beforehand

on_codes = dense.DenseOrSparse(sparse_code, dense.fill, dense.pick, DENSE)
decode, value_grad, decode_error = on_codes.decode, on_codes.value_grad, on_codes.decode_error
by_latent, latent_grads = on_codes.by_latent, on_codes.latent_grads


def topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool,
    effect: Effect | None = None,
    clip: bool = True,
) -> Ragged:
    if effect is None and screen.pays(x.shape[0], x.shape[1], W_enc.shape[1], k):
        values, columns, start = _screened_topk(x, W_enc, b_enc, b_dec, k, signed)
    else:
        values, columns, start = _whole_topk(x, W_enc, b_enc, b_dec, k, signed, effect)
    return values if signed or not clip else values.relu_(), columns, start


def _screened_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, signed: bool
) -> Ragged:
    operands = screen.Screen(x, W_enc, _bias(b_enc, W_enc.shape[1]), b_dec, signed)
    values, columns, left = screen.topk(operands, k)
    if left.numel():
        rest = _whole_topk(x[left], W_enc, b_enc, b_dec, k, signed, None)
        values[left], columns[left] = rest[0].view(-1, k), rest[1].view(-1, k)
    return values.flatten(), columns.flatten(), torch.arange(0, values.numel() + 1, k)


def _whole_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    signed: bool,
    effect: Effect | None,
) -> Ragged:
    n, bias, mode, weights, effects = x.shape[0], _bias(b_enc, W_enc.shape[1]), MODES[signed], UNWEIGHTED, None
    if effect is not None:
        mode, weights = select.MAGNITUDE_GRADIENT if signed else select.GRADIENT, effect.weights
        effects = blocks(effect.grads, effect.W_dec.T)
    code, budgets = Staged(n, np.full(n, k)), np.full(n, k)
    for row, column, z in blocks(centred(x, b_dec), W_enc):
        extra = NOTHING if effects is None else array(next(effects)[2])
        code.offer(z, row, column, bias[column:], extra, mode, weights, budgets)
    if effects is not None:
        effects.close()
    return torch.from_numpy(code.values), torch.from_numpy(code.columns), torch.from_numpy(code.start)


class Staged:
    """Entries set aside for each row: ``room[r]`` places, of which ``counts[r]`` are taken."""

    def __init__(self, n: int, room: np.ndarray) -> None:
        self.start = np.concatenate([[0], np.cumsum(room)])
        self.counts = np.zeros(n, np.int64)
        total = int(self.start[-1])
        self.keys, self.values, self.columns = empty(total), empty(total), np.empty(total, np.int64)

    def offer(self, z, row, column, bias, extra, mode, weights, budgets, bound=0.0) -> None:
        """Let rows ``row ..`` choose from a block of the product (see ``select_rows``)."""
        rows = slice(row, row + z.shape[0])
        out = self.start[row : row + z.shape[0] + 1], self.keys, self.values, self.columns, self.counts[rows]
        scoring = bias[: z.shape[1]], extra, mode, weights, budgets[rows], bound
        launch(select.select_rows, select.select_driver, z.shape[0], array(z), column, *scoring, *out)

    def packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values and columns without the gaps."""
        total = int(self.counts.sum())
        out = empty(total), empty(total), np.empty(total, np.int64)
        pack(self.start, self.counts, self.keys, self.values, self.columns, *out)
        return out


def batch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool) -> Ragged:
    n, d_sae, found = x.shape[0], W_enc.shape[1], None
    if budget and screen.pays(x.shape[0], x.shape[1], d_sae, -(-budget // n)):
        found = screen.batch(screen.Screen(x, W_enc, _bias(b_enc, d_sae), b_dec, signed), budget)
    _, values, flat = found or _whole_batch(x, W_enc, b_enc, b_dec, budget, signed)
    rows, columns = np.divmod(flat, d_sae)
    order, row_ptr, _ = by_column(rows, np.array([0, rows.size]), n)
    values = torch.from_numpy(values[order])
    return values if signed else values.relu_(), torch.from_numpy(columns[order]), torch.from_numpy(row_ptr)


def _whole_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, budget: int, signed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d_sae = W_enc.shape[1]
    mode, bias = MODES[signed], _bias(b_enc, d_sae)
    keys, values, flat, bound = empty(0), empty(0), np.empty(0, np.int64), -np.inf
    for row, column, z in blocks(centred(x, b_dec), W_enc):
        if bound == -np.inf:
            bound = _first_bound(z, bias[column:], mode, budget)
        found = _reaching(z, column, bias[column:], NOTHING, mode, bound)
        rows = np.repeat(np.arange(row, row + z.shape[0]), found.counts)
        new_keys, new_values, columns = found.packed()
        keys, values = np.concatenate([keys, new_keys]), np.concatenate([values, new_values])
        flat = np.concatenate([flat, rows * d_sae + columns])
        kept = merge_best(keys, values, flat, budget)
        keys, values, flat = keys[:kept], values[:kept], flat[:kept]
        # Once the budget is full, what stays below its smallest key cannot enter: later blocks yield less and less.
        bound = float(keys.min()) if kept == budget else -np.inf
    return keys, values, flat


def _first_bound(z: Tensor, bias: np.ndarray, mode: int, budget: int) -> float:
    """A value that at least ``budget`` keys of this block reach, or ``-inf``: the budget-th largest lane maximum."""
    lanes = min(select.FEW_LANES, z.shape[1])
    if budget > z.shape[0] * lanes:
        return -np.inf
    maxima = np.empty((z.shape[0], lanes), np.float32)
    arguments = array(z), bias[: z.shape[1]], NOTHING, mode, maxima
    launch(select.maxima_rows, select.maxima_driver, z.shape[0], *arguments)
    return float(kth_largest(maxima.reshape(-1), maxima.size, budget))


def _reaching(z, column, bias, extra, mode, bound) -> Staged:
    """All keys of a block that reach ``bound``, however many there are."""
    n, room = z.shape[0], STAGED
    while True:
        staged = Staged(n, np.full(n, room))
        staged.offer(z, 0, column, bias, extra, mode, UNWEIGHTED, np.full(n, -1), bound)
        most = int(staged.counts.max(initial=0))
        if most <= room:
            return staged
        room = most  # some row has more than was set aside: once more, with room for the fullest


def latent(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budgets: Tensor,
    signed: bool,
    sizes: tuple[int, int] | None = None,
) -> Ragged:
    (n, d_sae), mode = (x.shape[0], W_enc.shape[1]), MODES[signed]
    code, per_latent = Staged(d_sae, budgets.numpy()), budgets.numpy()
    for row, z in products(W_enc.T, centred(x, b_dec).T):  # z [latents, n]
        if b_enc is not None:
            z += b_enc[row : row + z.shape[0], None]
        code.offer(z, row, 0, np.zeros(n, np.float32), NOTHING, mode, UNWEIGHTED, per_latent)
    order, row_ptr, latents = by_column(code.columns, code.start, n)
    values = torch.from_numpy(code.values[order])
    return values if signed else values.relu_(), torch.from_numpy(latents), torch.from_numpy(row_ptr)


def threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, cut: Tensor, signed: bool
) -> Ragged:
    mode, bias = select.MAGNITUDE_ABOVE if signed else select.ABOVE, _bias(b_enc, W_enc.shape[1])
    values, columns, counts = [], [], []
    for _, z in products(centred(x, b_dec), W_enc):
        # key - cut > 0 exactly where key > cut; the smallest positive number turns "at least" into "above".
        found = _reaching(z, 0, bias, array(cut)[None], mode, float(np.float32(1e-45)))
        packed = found.packed()
        values.append(torch.from_numpy(packed[1]))
        columns.append(torch.from_numpy(packed[2]))
        counts.append(torch.from_numpy(found.counts))
    return torch.cat(values), torch.cat(columns), pointers(torch.cat(counts))


def _bias(b_enc: Tensor | None, width: int) -> np.ndarray:
    return np.zeros(width, np.float32) if b_enc is None else array(b_enc)
