"""What the sublayers of a block add to the residual stream, found by running the block once.

``resid_mid = resid_pre + attn_out`` and ``resid_post = resid_mid + mlp_out`` define ``hook_attn_out``, ``hook_mlp_out``
and ``hook_resid_mid``. Which module shows these tensors differs from family to family: a norm may follow the sublayer
(Gemma 2), a multiplier (Granite), or the module may return its output with the residual stream already added (BLOOM).
So a few tokens are run, and the modules are taken whose outputs fulfil the definition.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saelab.errors import first_line
from saelab.lm.offload import device_of, is_offloaded, whole
from saelab.lm.structure import Reached, attention, blocks, children, mlp, state_space, text_config, underlying
from saelab.lm.unwrapped import plain_model, plain_skeleton

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_log = logging.getLogger(__name__)
_TOKENS = 6  # run through the model


@dataclass(frozen=True)
class Place:
    """A side of a module, and the number by which the model multiplies what it holds."""

    path: str  # below the block
    side: str
    scale: float = 1.0


@dataclass(frozen=True)
class Sublayers:
    """The places of one block; None where no module shows such a tensor."""

    attn_out: Place | None
    mlp_out: Place | None
    resid_mid: Place | None


@dataclass(frozen=True)
class _Record:
    path: str
    side: str
    x: Tensor


_known: WeakKeyDictionary[nn.Module, dict[int, Sublayers]] = WeakKeyDictionary()


def sublayers(model: nn.Module, index: int) -> Sublayers | None:
    """The places of block ``index`` of a bridge or of a plain Hugging Face model, the same on both.

    The model runs once, up to that block. None for a bridge whose weights fit no plain model.
    """
    found = _known.setdefault(underlying(model), {})
    if index not in found:
        plain = model if underlying(model) is model else plain_model(cast("TransformerBridge", model))
        if plain is None:
            return None
        _, layers = blocks(plain)
        try:
            found[index] = _find(layers[index], _run(plain, layers[index]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a block stumbles over that is run alone, or with token ids only
            _log.info("block %d could not be run (%s)", index, first_line(error))
            found[index] = Sublayers(None, None, None)
    return found[index]


@torch.no_grad()
def _run(model: nn.Module, block: nn.Module) -> list[_Record]:
    """Inputs and outputs of the modules in a block, in the order in which they arise; the block's own are the outer."""
    records: list[_Record] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        # Two bytes are too few to tell a small sum from a large one, so this block runs in four, as a copy.
        own = next(iter(block.parameters()), torch.empty(0)).dtype
        if own.is_floating_point and own.itemsize < 4:
            args, kwargs = _widened(args), _widened(kwargs)
            inner = _wide(model, block)
        else:
            inner = block
        handle.remove()
        records.extend(_recorded(inner, args, kwargs))
        raise Reached

    size = int(text_config(model).vocab_size)
    ids = torch.linspace(size // 4, size // 2, _TOKENS).long()[None]
    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with contextlib.suppress(Reached):
            model(input_ids=ids.to(device_of(model)), use_cache=False)
    finally:
        handle.remove()
    return records


def _wide(model: nn.Module, block: nn.Module) -> nn.Module:
    """A copy of a block in float32, all of it in this process."""
    if not is_offloaded(block):
        return copy.deepcopy(block).float()
    path = next(path for path, module in model.named_modules() if module is block)
    empty = plain_skeleton(model)
    assert empty is not None
    made, device = empty.get_submodule(path), device_of(model)
    for below, module in made.named_modules():
        own, where = block.get_submodule(below), f"{path}.{below}".rstrip(".")
        for leaf, tensor in own._parameters.items():
            values = None if tensor is None else whole(model, where, leaf, tensor).detach().float().to(device)
            module._parameters[leaf] = None if values is None else nn.Parameter(values, requires_grad=False)
        module._buffers.update(own._buffers)
    return made.eval()


def _recorded(block: nn.Module, args: Any, kwargs: Any) -> list[_Record]:
    """What the modules that run once in a block see, of the size of the block's input, in its shape."""
    records: list[_Record] = []
    names = {module: path for path, module in block.named_modules()}
    calls: dict[str, int] = {}

    def keep(path: str, side: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple | list) and x else x
        if isinstance(x, Tensor) and x.is_floating_point():
            records.append(_Record(path, side, x.detach().clone()))  # later modules may write into it

    def before(module: nn.Module, given: Any, named: Any) -> None:
        calls[names[module]] = calls.get(names[module], 0) + 1
        keep(names[module], "in", given or named.get("hidden_states"))

    def after(module: nn.Module, _given: Any, output: Any) -> None:
        keep(names[module], "out", output)

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(after))
        block(*args, **kwargs)
    once = [record for record in records if calls.get(record.path) == 1]
    first = next((record.x for record in once if record.path == ""), None)
    if first is None:
        return []
    return [_Record(r.path, r.side, r.x.reshape(first.shape)) for r in once if r.x.numel() == first.numel()]


def _widened(value: Any) -> Any:
    """Tensors of two-byte numbers in float32, wherever they are in the arguments of a block."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_widened(item) for item in value)
    return {key: _widened(item) for key, item in value.items()} if isinstance(value, dict) else value


def _find(block: nn.Module, records: list[_Record]) -> Sublayers:
    if not records or records[-1].path != "":
        return Sublayers(None, None, None)
    x, y = records[0].x, records[-1].x
    order = list(children(block))
    heads, rest = _candidates(order, records, attention(block)), _candidates(order, records, mlp(block))
    attn_out, stream = _added(records, heads, [x])
    if attn_out is None:
        for (_, first), (_, second) in itertools.product(heads, rest):
            scale = _multiple(x, y, first.x + second.x)
            if scale is not None:  # attention and MLP read the same input
                return Sublayers(Place(first.path, "out", scale), Place(second.path, "out", scale), None)
        attn_out, stream = _added_with(records, heads, _candidates(order, records, state_space(block)))
        if heads and attn_out is None:
            return Sublayers(None, None, None)
    mlp_out, _, mid = _added_to(records, rest, _streams(records, stream), _ends(records, rest))
    reads = [r for r in records if mid is not None and r.side == "in" and r.path and torch.equal(r.x, mid)]
    shallow = min(reads, key=lambda r: r.path.count("."), default=None)
    return Sublayers(attn_out, mlp_out, None if attn_out is None or shallow is None else Place(shallow.path, "in"))


def _streams(records: list[_Record], start: Tensor | None) -> list[Tensor]:
    """The residual stream between the sublayers: ``start``, and what norms in the block itself make of it. Sums inside
    a sublayer, such as those of experts, are none."""
    own = [r for r in records if r.side == "in" and r.path and "." not in r.path]
    if start is None:  # no attention before
        return _distinct([records[0].x, *(r.x for r in own)])
    found = [start]
    for given in own:
        output = next((r.x for r in records if r.path == given.path and r.side == "out"), None)
        if output is not None and any(torch.equal(given.x, stream) for stream in found):
            found.append(output)
    return found


def _ends(records: list[_Record], rest: list[tuple[int, _Record]]) -> list[Tensor]:
    """The block's output, what a last norm makes it of, and the stream that the block's modules behind the MLP
    (candidates ``rest``) read, to add something more to it."""
    y = records[-1].x
    norms = {r.path for r in records if r.side == "out" and r.path and "." not in r.path and torch.equal(r.x, y)}
    behind = min((i for i, _ in rest), default=len(records))
    later = [r.x for r in records[behind + 1 :] if r.side == "in" and "." not in r.path]
    return _distinct([y, *(r.x for r in records if r.side == "in" and r.path in norms), *later])


def _added(
    records: list[_Record], candidates: list[tuple[int, _Record]], streams: list[Tensor]
) -> tuple[Place | None, Tensor | None]:
    """The first candidate that some tensor after it adds to one of ``streams``, and that tensor."""
    place, total, _ = _added_to(records, candidates, streams)
    return place, total


def _added_with(
    records: list[_Record], heads: list[tuple[int, _Record]], others: list[tuple[int, _Record]]
) -> tuple[Place | None, Tensor | None]:
    """The candidate of ``heads`` that is added to the block's input together with one of ``others``, and the sum."""
    x = records[0].x
    for (i, first), (j, second) in itertools.product(heads, others):
        for total in _distinct(r.x for r in records[max(i, j) + 1 :]):
            parts = torch.stack([first.x.double().flatten(), second.x.double().flatten()], dim=1)
            change = (total.double() - x.double()).flatten()[:, None]
            scales = torch.linalg.lstsq(parts, change).solution.flatten().tolist()
            both = (scales[0] * first.x.double() + scales[1] * second.x.double()).to(x.dtype)
            # A sum to which the attention adds nothing that shows is none.
            if _multiple(x, total, both) and _multiple(total - both + scales[0] * first.x, total, scales[1] * second.x):
                return Place(first.path, "out", 1.0 if abs(scales[0] - 1) < 1e-3 else scales[0]), total
    return None, None


def _added_to(
    records: list[_Record],
    candidates: list[tuple[int, _Record]],
    streams: list[Tensor],
    totals: list[Tensor] | None = None,
) -> tuple[Place | None, Tensor | None, Tensor | None]:
    """The same, and the stream that it was added to; ``totals`` are the sums that count, by default all later ones."""
    for number, record in candidates:
        for total in _distinct(r.x for r in records[number + 1 :]) if totals is None else totals:
            for stream in streams:
                scale = _multiple(stream, total, record.x)
                if scale is not None:
                    return Place(record.path, "out", scale), total, stream
    return None, None, None


def _candidates(order: list[str], records: list[_Record], sublayer: str | None) -> list[tuple[int, _Record]]:
    """Outputs that may be the sublayer's contribution: its own, those inside it, then those of modules after it."""
    if sublayer is None:
        return []
    outputs = [(i, r) for i, r in enumerate(records) if r.side == "out" and r.path]
    within = [(i, r) for i, r in outputs if sublayer == "" or f"{r.path}.".startswith(f"{sublayer}.")]
    end = max((i for i, _ in within), default=None)
    if end is None:
        return []
    later = [(i, r) for i, r in outputs if i > end and r.path in order]
    # The outermost module that shows it is the one that users name; what runs last inside is next.
    within.sort(key=lambda item: (item[1].path.count("."), -item[0]))
    return within + later


def _multiple(before: Tensor, after: Tensor, part: Tensor) -> float | None:
    """The number ``s`` with ``after = before + s * part`` up to rounding; None where there is none."""
    eps = 4 * torch.finfo(torch.float32 if after.dtype == torch.float64 else after.dtype).eps
    before, after, part = (t.double().flatten(0, -2) for t in (before, after, part))
    total = after - before
    size = float(part.square().sum())
    if size == 0:
        return None
    scale = float((total * part).sum()) / size
    rounding = eps * (before.norm(dim=-1) + after.norm(dim=-1))
    plain = (scale * part).norm(dim=-1)
    if not bool(((scale * part - total).norm(dim=-1) <= rounding + 1e-5 * plain).all()):
        return None
    if int((plain > 16 * rounding).sum()) < 2:
        return None  # too small to be told from nothing
    return 1.0 if abs(scale - 1) < 1e-3 else scale


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in tensors:
        if not any(torch.equal(x, y) for y in found):
            found.append(x)
    return found
