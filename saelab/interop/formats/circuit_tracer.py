"""circuit-tracer's transcoders: ``layer_N.safetensors``, and the set's ``config.yaml`` beside it.

A set has a file for each layer of the model, from 0 on; each file is one transcoder here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from saelab.errors import UserError
from saelab.files import write_tensors
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_tensors
from saelab.lm.hook_names import layer_of
from saelab.sae.inference import InferenceForm

FILE = re.compile(r"layer_(\d+)\.safetensors")
CONFIG = "config.yaml"
THRESHOLDS = ("activation_function.threshold", "threshold")
RULES = {"topk": "topk", "jumprelu": "jump_relu", "standard": "relu"}
MAX_SETTINGS = 2**20  # bytes


def sniff(path: Path) -> bool:
    """A file ``layer_N.safetensors`` beside a ``config.yaml`` that names a hook for features, or a folder with one."""
    file = _file(path)
    return FILE.fullmatch(file.name) is not None and file.is_file() and bool(_settings(file.parent))


def read(path: Path) -> Foreign:
    """One layer of a set: ``W_enc`` and ``W_dec [d_sae, d_model]``, ReLU, a threshold per latent, or ``k``."""
    path = _file(path)
    raw, settings, layer = read_tensors(path), _settings(path.parent), FILE.fullmatch(path.name)
    assert layer is not None
    d_sae, d_in = matrix_shape(raw, "W_enc", path)
    d_out = matrix_shape(raw, "W_dec", path)[1]
    shapes = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    threshold = next((name for name in THRESHOLDS if name in raw), None)
    if threshold is not None:
        raw[threshold] = raw[threshold].reshape(-1).expand(d_sae)
        shapes[threshold] = (d_sae,)
    if "W_skip" in raw:
        shapes["W_skip"] = (d_out, d_in)
    t = checked(raw, shapes, path)
    k = int(raw["k"]) if "k" in raw else None
    place = f"blocks.{layer[1]}."
    return Foreign(
        format="circuit_tracer",
        architecture="topk" if k is not None else "jump_relu" if threshold is not None else "relu",
        W_enc=t["W_enc"].T,
        b_enc=t["b_enc"],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        k=k,
        threshold=None if threshold is None else t[threshold],
        subtracts_b_dec=False,
        transcodes=True,
        W_skip=t.get("W_skip"),
        metadata={
            "model_name": settings.get("model_name"),
            "hook_name": place + settings.get("feature_input_hook", "mlp.hook_in"),
            "hook_name_out": place + settings["feature_output_hook"],
        },
    )


def _file(path: Path) -> Path:
    """The only layer of a folder; another path is the file itself."""
    files = list(path.glob("layer_*.safetensors")) if path.is_dir() else []
    return files[0] if len(files) == 1 else path


def _settings(folder: Path) -> dict[str, str]:
    """The texts of the set's configuration; nothing where it names no hook point that features write to."""
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_SETTINGS:
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    found = dict(re.findall(r"^(\w+): *[\"']?([^\"'\n#]+?)[\"']? *$", text, re.M))
    return found if "feature_output_hook" in found else {}


def write(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    """Write one layer of a set. UserError for what is no transcoder, and for a rule that circuit-tracer lacks."""
    if form.d_out is None:
        raise UserError("circuit-tracer holds transcoders, and this SAE reconstructs what it reads; use saelens")
    if form.architecture not in RULES:
        raise UserError(f"circuit-tracer knows {', '.join(RULES)}; this transcoder is {form.architecture} at inference")
    places = [str(metadata.get(name) or "") for name in ("hook_name", "hook_name_out")]
    layer = layer_of(places[1])
    if layer is None:
        raise UserError("circuit-tracer names files by their layer, and this transcoder does not record its hooks")
    t = form.tensors
    tensors = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    if form.architecture == "jumprelu":
        tensors[THRESHOLDS[0]] = t["threshold"]
    if form.architecture == "topk":
        tensors["k"] = torch.tensor(form.config["k"])
    if "W_skip" in t:
        tensors["W_skip"] = t["W_skip"]
    write_tensors(folder / f"layer_{layer}.safetensors", tensors)
    points = [place.partition(f"blocks.{layer}.")[2] or place for place in places]
    lines = [f"model_name: {metadata.get('model_name') or ''}", "model_kind: transcoder_set"]
    lines += [f"feature_input_hook: {points[0]}", f"feature_output_hook: {points[1]}", "scan: saelab"]
    (folder / CONFIG).write_text("\n".join(lines) + "\n", encoding="utf-8")


FILES = ("layer_*.safetensors",)
register(Format("circuit_tracer", FILES, sniff, read, write, tells_kind=True, holds_targets=True))
