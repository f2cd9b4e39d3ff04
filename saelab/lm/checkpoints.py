"""What a model's folder or hub repository holds: a causal language model, a part of one, an adapter, something else."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.errors import UserError, damaged, first_line

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_HUB = "hf://"
_QUANTISED = re.compile(r"(weight_scale(_inv)?|[._]scales|[._]qweight|[._]qzeros|absmax|[._]SCB|zero_point)$")
_log = logging.getLogger(__name__)
# Adapters that put tokens or vectors of their own in front of the text, so that positions are not those of the text.
_VIRTUAL_TOKENS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT"}


@dataclass(frozen=True)
class Source:
    """Where a model is read from: an existing folder, or a hub id."""

    name: str  # absolute path, or hub id without hf://
    local: bool
    base: str | None = None  # of an adapter: the folder or hub id of the model that it adapts


def find_source(name: str) -> Source:
    """The folder or hub id that a name stands for; UserError for a folder that holds no model."""
    if name.startswith(_HUB):
        return Source(name.removeprefix(_HUB), local=False)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a model that save_pretrained wrote")
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise UserError(f"model folder {folder} does not exist; give one that does, or smollm2")
        return Source(name, local=False)
    folder = folder.resolve()
    if (folder / _ADAPTER).is_file():
        return Source(str(folder), local=True, base=_base_of(folder))
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{folder} holds no model: {_CONFIG} is missing; give a folder that save_pretrained wrote")
    return Source(str(folder), local=True)


def _base_of(folder: Path) -> str:
    """What the adapter in a folder adapts: a folder, or a hub id, which is then read from the hub's local cache."""
    with damaged(folder / _ADAPTER, "save the adapter again"):
        content = json.loads((folder / _ADAPTER).read_bytes())
        base, kind = content["base_model_name_or_path"], str(content["peft_type"]).upper()
        if not isinstance(base, str) or not base:
            raise ValueError("it names no base model")
    if kind in _VIRTUAL_TOKENS:
        raise UserError(
            f"{folder} is an adapter of kind {kind}, which adds tokens or vectors in front of the text; saelab reads "
            "adapters that change weights, such as LoRA"
        )
    for place in (Path(base).expanduser(), folder / base):
        if (place / _CONFIG).is_file():
            return str(place.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise UserError(f"the base model {base} of the adapter {folder} does not exist; put it there")
    return base


def read_adapter(model: Any, source: Source) -> Any:
    """``model`` with the adapter in the folder put into its layers; its module paths stay as they are."""
    try:
        from peft import PeftModel  # pyright: ignore[reportMissingImports] -- optional
    except ImportError as error:
        why = f"reading it needs peft ({first_line(error)}): pip install peft"
        raise UserError(f"{source.name} is an adapter; {why}") from error
    adapted = PeftModel.from_pretrained(model, source.name, local_files_only=True)
    inner: Any = adapted.get_base_model()
    inner.config._name_or_path = source.name
    return inner


def check_causal(config: Any, source: Source) -> Any:
    """The transformers class that loads the model; UserError, by name, for one that is no causal language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    seeing = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    made = list(config.architectures or [])
    kind, shown = config.model_type, made[0] if made else config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{source.name} is {shown}, an encoder-decoder; saelab reads causal language models")
    if made and not {*made} & {*_classes(causal), *_classes(seeing)}:
        what = "has no language-model head" if shown.endswith("Model") else "is no causal language model"
        raise UserError(f"{source.name} is {shown}, which {what}; give the folder of a ...ForCausalLM")
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        raise UserError(f"{source.name} is {shown}, whose attention looks ahead; saelab reads causal language models")
    # A multimodal model is loaded whole, in the class that wrote it.
    if kind in causal and (not made or {*made} & {*_classes({kind: causal[kind]})}):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if kind in seeing else AutoModelForCausalLM


def _classes(mapping: dict[str, Any]) -> set[str]:
    """The class names in a table of transformers, which holds a name or several for each kind of model."""
    return {name for found in mapping.values() for name in ((found,) if isinstance(found, str) else found)}


def _check_unused(names: list[str], source: Source) -> None:
    """Warn of weights that the model does not use, as where its configuration has too few layers; refuse where they
    say that the others are quantised, which the configuration does not."""
    scales = [name for name in names if _QUANTISED.search(name)]
    if scales:
        raise UserError(
            f"{source.name} holds quantised weights ({scales[0]}), and its {_CONFIG} has no quantization_config to say "
            "how; get the folder again"
        )
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        _log.warning(
            "%s holds weights that the model of its %s does not use: %s%s", source.name, _CONFIG, names[0], more
        )


def check_complete(info: dict[str, Any], model: Any, source: Source) -> None:
    """Refuse a model of which transformers has made up a part: it would be another one each time it is loaded."""
    missing = sorted(info.get("missing_keys") or ())
    if not missing:
        _check_unused(sorted(info.get("unexpected_keys") or ()), source)
        return
    head = next((name for name in missing if "head" in name or "embed_out" in name), None)
    what = f"no language-model head ({head})" if head else f"no weights for {missing[0]}"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise UserError(f"{source.name} holds {what}{more}; give the folder of a complete {type(model).__name__}")
