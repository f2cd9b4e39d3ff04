"""Dictionary parallel: each rank holds ``d_sae / W`` latents, and the k largest are chosen among all of them.

Every rank selects the k best of its own latents; the ranks exchange these candidates (value and index, k per token
and rank) and each keeps those of its own that are among the k best of all. That set is exact: a latent outside its
rank's first k cannot be among the first k of all. A budget over the batch or over the tokens of a latent is spent by
the variant (:mod:`saelab.sae.share`). The reconstruction is the sum of the ranks' partial decodings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saelab import kernels, losses
from saelab.distributed.world import Parallel
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae import SAE, LinearSAE, build, objective
from saelab.sae.base import unit_rows
from saelab.sae.budget import BudgetSAE
from saelab.sae.share import Share
from saelab.sparse import SparseCode

REPLICATED = ("b_dec", "W_skip")  # parameters that every dictionary rank holds in full


def whole(sae: SAE, parallel: Parallel) -> SAE:
    """The SAE that a shard is part of, without storage: for its sizes and its configuration."""
    if parallel.dict_size == 1:
        return sae
    with torch.device("meta"):
        return build(sae.variant, **{**sae.config, "d_sae": sae.d_sae * parallel.dict_size})


def share_of(parallel: Parallel) -> Share:
    """This process's part of each step, for the variant."""
    if parallel.size == 1:
        return Share()
    # In plain functions: a bound method would take the process groups along where the SAE is copied.
    return Share(
        parallel.data_size,
        parallel.data_rank,
        parallel.dict_size,
        parallel.dict_rank,
        lambda tensor: parallel.sum_data(tensor.clone(), "budget"),
        lambda tensor: parallel.least_data(tensor.clone(), "budget"),
        lambda tensor: parallel.sum_all(tensor.clone(), "budget"),
    )


def build_shard(variant: str, d_in: int, d_sae: int, seed: int, parallel: Parallel, **config: Any) -> SAE:
    """This rank's latents of the SAE that ``torch.manual_seed(seed); build(...)`` gives in a single process.

    No rank ever holds the whole dictionary.
    """
    torch.manual_seed(seed)
    if parallel.dict_size == 1:
        return build(variant, d_in, d_sae, **config)
    if d_sae % parallel.dict_size:
        raise UserError(f"d_sae={d_sae} does not divide over {parallel.dict_size} dictionary ranks; take a multiple")
    part = d_sae // parallel.dict_size
    for name in ("k", "k_start"):
        if (config.get(name) or 1) > part:
            raise UserError(f"{name}={config[name]} exceeds the {part} latents of a rank; use fewer dictionary ranks")
    sae = build(variant, d_in, part, **config)
    reason = _unsplittable(sae)
    if reason is not None or not isinstance(sae, LinearSAE):
        chosen = ", ".join(f"{name}={value}" for name, value in config.items() if name != "k")
        raise UserError(
            f"{variant}{f' with {chosen}' if chosen else ''} cannot be split over dictionary ranks ({reason}); "
            "use dict_ranks=1, which is data parallel"
        )
    _check_warmup(sae, d_sae, config.get("k_start"))
    sae.join(parallel.dict_rank, lambda tensor: parallel.gather_dict(tensor, "statistics"))
    torch.manual_seed(seed)
    with torch.no_grad():
        rows = unit_rows(_rows_of_randn(d_sae, d_in, parallel.latents(d_sae)))
        sae.W_enc.copy_(rows.T)
        if sae.d_out != d_in:
            rows = unit_rows(_rows_of_randn(d_sae, sae.d_out, parallel.latents(d_sae)))
        sae.W_dec.copy_(rows)
    return sae


def _check_warmup(sae: SAE, d_sae: int, given: int | None) -> None:
    """Refuse a warm-up that a single process would begin with more latents than a rank has."""
    if isinstance(sae, BudgetSAE) and sae.k_warmup and given is None and (start := min(4 * sae.k, d_sae)) > sae.d_sae:
        raise UserError(
            f"k_warmup begins at 4 k = {start:g}, which exceeds the {sae.d_sae} latents of a rank; give a smaller "
            "k_start, or use fewer dictionary ranks"
        )


def _unsplittable(sae: SAE) -> str | None:
    """Why the latents of ``sae`` cannot be divided among processes, as a clause."""
    if not isinstance(sae, LinearSAE) or sae.budget_over is None:
        return "its selection is not a budget that ranks can share: budget_over is None"
    for method in ("reconstruction_loss", "extra_losses"):
        if getattr(type(sae), method) is not getattr(SAE, method):
            return f"its {method} sees the whole dictionary"
    for name, parameter in sae.named_parameters():
        if name not in REPLICATED and sae.d_sae not in parameter.shape:
            return f"its parameter {name} is not per latent"
    return None


def _rows_of_randn(d_sae: int, d_in: int, rows: slice) -> Tensor:
    """``torch.randn(d_sae, d_in)[rows]``, a block at a time."""
    # The CPU generator draws blocks of 16 numbers: pieces of a multiple of that continue one another exactly.
    if (block := 16 * max(1, 2**20 // (16 * d_in))) >= d_sae:
        return torch.randn(d_sae, d_in)[rows]
    kept = []
    for start in range(0, d_sae, block):
        # The last piece ends with the tensor, whose end is drawn like the end of the whole.
        piece = torch.randn(min(block, d_sae - start), d_in)
        kept.append(piece[max(rows.start - start, 0) : max(rows.stop - start, 0)])
    return torch.cat(kept)


def represent(
    sae: SAE,
    x: Tensor,
    grads: Tensor | None,
    parallel: Parallel,
    sums: kernels.RowSums | None = None,
    target: Tensor | None = None,
) -> tuple[SparseCode, Tensor, Tensor]:
    """The code (of this rank's latents), the objective's first term, and what was decoded, without gradient."""
    if parallel.dict_size == 1:
        return objective.represent(sae, x, grads, sums, target)
    assert isinstance(sae, LinearSAE)
    with torch.no_grad():
        selected = sae.select(x, grads)
        if sae.budget_over == "token":
            selected = winners(selected, x.shape[0], round(sae.budget), sae, parallel)
    b_in = None if sae.b_in is None else _SumBackward.apply(sae.b_in, parallel)
    pre_acts = kernels.pre_acts_at(x, sae.W_enc, sae.b_enc, b_in, selected)  # pyright: ignore[reportArgumentType]
    code = SparseCode(sae.activate(pre_acts, selected.indices), selected.indices, selected.row_ptr, sae.d_sae)
    recon = _decode(code.values, selected, sae.W_dec, parallel) + sae.b_dec
    return code, ((x if target is None else target) - recon).square().sum(), recon.detach()


def auxk(
    sae: LinearSAE,
    x: Tensor,
    error: Tensor,
    rows: losses.Subset,
    k_aux: int,
    through: bool,
    n_latents: int,
    parallel: Parallel,
) -> Tensor:
    """:func:`saelab.losses.auxk` over all ranks: this data rank's part of it.

    ``rows`` are those of this rank, ``n_latents`` how many all dictionary ranks have together.
    """
    if parallel.size == 1:
        return losses.auxk(sae, x, error, rows, k_aux, through)
    latents, W_enc, b_enc = rows.latents, rows.W_enc.T, rows.b_enc
    b_in = None if sae.b_in is None else sae.b_in.detach()
    k = min(k_aux, n_latents)
    empty = SelectedPreActs(x.new_empty(0), latents.new_empty(0), latents.new_zeros(x.shape[0] + 1))
    selected = empty
    if latents.numel():
        own = min(k, latents.numel())
        selected = kernels.select_topk(x, W_enc.detach(), b_enc.detach(), b_in, own, sae.signed, not through)
    if parallel.dict_size > 1:
        selected = winners(selected, x.shape[0], k, sae, parallel, latents)
    partial = error.new_zeros(error.shape) + 0.0 * rows.W_dec.sum()  # in the graph, also without latents
    if latents.numel():
        values = kernels.pre_acts_at(x, W_enc, b_enc, b_in, selected)
        if through and not sae.signed:
            values = kernels.rectified(values)
        partial = kernels.decode(values, selected.indices, selected.row_ptr, rows.W_dec, None)
    recon = _SumForward.apply(partial, parallel)
    moments = torch.cat([error.sum(0), error.new_tensor([float(error.shape[0])])])
    parallel.sum_data(moments, "statistics")
    spread = (error - moments[:-1] / moments[-1]).square().sum()[None]
    parallel.sum_data(spread, "statistics")
    return losses.relative((recon - error).square().sum(), spread[0])  # pyright: ignore[reportOperatorIssue]


def winners(
    selected: SelectedPreActs, n: int, k: int, sae: LinearSAE, parallel: Parallel, latents: Tensor | None = None
) -> SelectedPreActs:
    """Those of this rank's candidates (equally many for each token) that are among the ``k`` largest of all ranks.

    Ties go to the lowest latent, as in a single process. ``latents`` gives the candidates' numbers in the whole
    dictionary; the returned indices are the rank's own.
    """
    own = selected.indices.numel() // n
    values, indices = selected.values.view(n, own), selected.indices.view(n, own)
    names = (indices if latents is None else latents[indices]) + parallel.dict_rank * sae.d_sae
    key = values.new_full((n, k), -torch.inf)
    key[:, :own] = values.abs() if sae.signed else values
    name = torch.full((n, k), torch.iinfo(torch.int32).max, dtype=torch.int32, device=values.device)
    name[:, :own] = names.int()
    keys = parallel.gather_dict(key, "candidates").transpose(0, 1).flatten(1)  # [n, rank * k]
    all_names = parallel.gather_dict(name, "candidates").transpose(0, 1).flatten(1)
    by_name = all_names.argsort(dim=1)
    order = by_name.gather(1, keys.gather(1, by_name).argsort(dim=1, descending=True, stable=True))
    won = torch.zeros(keys.shape, dtype=torch.bool, device=values.device).scatter_(1, order[:, :k], True)
    mine = won.unflatten(1, (-1, k))[:, parallel.dict_rank, :own]
    row_ptr = torch.cat([mine.new_zeros(1, dtype=torch.int64), mine.sum(1).cumsum(0)])
    return SelectedPreActs(values[mine], indices[mine], row_ptr)


def _decode(values: Tensor, selected: SelectedPreActs, W_dec: Tensor, parallel: Parallel) -> Tensor:
    partial = kernels.decode(values, selected.indices, selected.row_ptr, W_dec, None)
    return _SumForward.apply(partial, parallel)  # pyright: ignore[reportReturnType]


class _SumForward(torch.autograd.Function):
    """Add up over the dictionary ranks; each rank's part gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, parallel: Parallel) -> Tensor:
        return parallel.sum_dict(partial.clone(), "reconstruction")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBackward(torch.autograd.Function):
    """The identity; the gradient adds up over the dictionary ranks, because each rank sees only its own latents'."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, parallel: Parallel) -> Tensor:
        ctx.parallel = parallel
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.parallel.sum_dict(grads[0].clone(), "bias"), None
