"""A training step that processes share, as a variant sees it, and budgets that are spent over all of them.

Each process has a part of the batch, a part of the dictionary, or a part of both. A mean over tokens needs nothing of
this, because the trainer adds such terms up. What is not one (the largest entries of a batch, a function of its mean
L0) goes through :class:`Share`, so that it is that of a single process.

Budgets are spent exactly, without sending candidates. Bit patterns of positive floats are ordered like the floats, so
the least one that is kept is found digit by digit, from the highest: all processes add up how many of their candidates
have each digit (a radix selection). Ties are settled by the place in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.kernels import SelectedPreActs

KEY_BITS = 31  # of a positive float32
DIGIT, DIGIT_OF_MANY = 11, 4  # bits settled in one exchange: for one budget, and for each of many


def _own(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Share:
    """This process's part of a training step. The default is all of it, for which every function is the identity.

    ``part`` of ``parts`` equal runs of a batch's tokens, in their order, and ``dict_part`` of ``dict_parts`` equal runs
    of latents. All processes call the functions at the same places.
    """

    parts: int = 1
    part: int = 0
    dict_parts: int = 1
    dict_part: int = 0
    sum: Callable[[Tensor], Tensor] = _own
    """Over the parts of the batch."""
    least: Callable[[Tensor], Tensor] = _own
    """Elementwise, over the parts of the batch."""
    sum_all: Callable[[Tensor], Tensor] = _own
    """Over all processes."""

    @property
    def alone(self) -> bool:
        """Whether one process does the whole step."""
        return self.parts * self.dict_parts == 1

    def mean(self, own: Tensor) -> Tensor:
        """The mean over the parts of the batch; its gradient is that of ``own``, as the trainer averages the parts."""
        if self.parts == 1:
            return own
        return own + (self.sum(own.detach().clone()) / self.parts - own.detach())


class Largest(NamedTuple):
    """Which of a process's entries are kept, and the key of the least one of each group, as its bit pattern."""

    kept: Bool[Tensor, " m"]
    least: Int[Tensor, " g"]


def largest(
    keys: Float[Tensor, " m"],
    places: Int[Tensor, " m"],
    n_places: int,
    wanted: Int[Tensor, " g"],
    add: Callable[[Tensor], Tensor],
    groups: Int[Tensor, " m"] | None = None,
) -> Largest:
    """The ``wanted`` largest entries of each group among those of all processes; ties go to the lowest place.

    ``add`` sums over the processes. Places are below ``n_places``, and no two entries of a group share one. Only keys
    above 0 are kept, all of them where fewer than wanted are.
    """
    groups = torch.zeros_like(places) if groups is None else groups
    live = keys > 0  # not for NaN
    code = torch.where(live, keys, 0).float().view(torch.int32).long()
    bits = DIGIT if wanted.numel() == 1 else DIGIT_OF_MANY
    least, left, ties = _search(code, live, groups, wanted, KEY_BITS, bits, add)
    above, tied = live & (code > least[groups]), live & (code == least[groups])
    if (ties > left).any():  # the same on all processes
        back = n_places - 1 - places
        last, _, _ = _search(back, tied, groups, left, (n_places - 1).bit_length(), bits, add)
        tied &= back >= last[groups]
    return Largest(above | (tied & (left[groups] > 0)), least)


def _search(
    code: Tensor, live: Tensor, groups: Tensor, wanted: Tensor, n_bits: int, step: int, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group the code of its ``wanted``-th largest live entry (0 if there are fewer), how many entries of this
    code are wanted, and how many there are."""
    found, left, ties = torch.zeros_like(wanted), wanted, wanted
    for shift in range(-(-n_bits // step) * step - step, -1, -step):
        digit = (code >> shift) & (2**step - 1)
        cells = (groups * 2**step + digit)[live]
        counts = add(cells.bincount(minlength=wanted.numel() << step).int()).long().view(-1, 2**step)
        above = counts.flip(1).cumsum(1).flip(1) - counts  # entries with a larger digit
        ends = (above < left[:, None]) & (above + counts >= left[:, None])
        chosen = ends.int().argmax(1)  # without such a digit the lowest one, so that all are kept
        left = left - above.gather(1, chosen[:, None])[:, 0]
        ties = counts.gather(1, chosen[:, None])[:, 0]
        live = live & (digit == chosen[groups])
        found = found << step | chosen
    return found, left, ties


def spend(select: Callable[[int], SelectedPreActs], n: int, d_sae: int, budget: int, share: Share) -> SelectedPreActs:
    """This process's entries among the ``budget`` largest of the step; ``select(m)`` gives the ``m`` largest of its
    own ``n * d_sae``. Entries that ReLU clips are left out."""
    if share.alone:
        return select(budget)
    most, of_all = min(budget, n * d_sae), share.dict_parts * d_sae
    room = min(most, 2 * budget // (share.parts * share.dict_parts) + 1)
    wanted = torch.tensor([budget])
    while True:
        found = select(room)
        keys, rows = found.values.abs(), _rows(found)
        places = (rows + share.part * n) * of_all + share.dict_part * d_sae + found.indices
        kept, least = largest(keys, places, share.parts * n * of_all, wanted.to(rows), share.sum_all)
        # What was not offered is at most as large as the least that was.
        floor = keys.min().float().view(torch.int32) if room < most else keys.new_zeros((), dtype=torch.int32)
        if not share.sum_all(((floor > 0) & (floor >= least[0])).int()[None]).item():
            return _only(found, kept)
        room = min(most, 2 * room)


def spend_by_latent(
    select: Callable[[Tensor], SelectedPreActs], n: int, budgets: Int[Tensor, " d_sae"], share: Share
) -> SelectedPreActs:
    """This process's entries among the ``budgets[j]`` largest of each latent in the step; ``select`` gives those of its
    own ``n`` tokens. Entries that ReLU clips are left out."""
    found = select(budgets)
    if share.parts == 1:
        return found
    places = _rows(found) + share.part * n
    kept, _ = largest(found.values.abs(), places, share.parts * n, budgets, share.sum, found.indices)
    return _only(found, kept)


def _rows(selected: SelectedPreActs) -> Tensor:
    counts = selected.row_ptr.diff()
    return torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)


def _only(selected: SelectedPreActs, kept: Tensor) -> SelectedPreActs:
    counts = _rows(selected)[kept].bincount(minlength=selected.row_ptr.numel() - 1)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SelectedPreActs(selected.values[kept], selected.indices[kept], row_ptr)
