"""The run folder: weights and configuration in SAELens' layout, the training state beside them.

``sae_weights.safetensors`` + ``cfg.json`` hold the SAE in units of raw activations, readable by SAELens wherever the
architecture exists there; what is ours alone stands under ``metadata``. Nothing is pickled.

While a run is under way its folder has ``checkpoints/step_NNNNNNNN/``: the same two files, usable on their own, and
``train_state.safetensors`` + ``train_state.json`` with everything else the next step depends on. Such a folder is
written under a temporary name, synced and renamed, and only then is its predecessor removed: whenever the process is
killed, the newest ``step_*`` is complete and its weights and state belong together.
"""

from saelab.checkpoint.files import replace, save_plain, write_json, write_tensors
from saelab.checkpoint.steps import (
    CHECKPOINTS,
    STATE,
    STATE_JSON,
    begin_step,
    commit_step,
    latest_step,
    load_step,
    number_of,
    remove_leftovers,
    remove_steps,
    save_step,
    step_path,
    unfinished_path,
)
from saelab.checkpoint.weights import (
    CONFIG,
    EXTRA,
    SAELENS_VERSION,
    WEIGHTS,
    load_config,
    load_metadata,
    load_sae,
    read_state,
    save_config,
    save_sae,
    saved_tensors,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EXTRA",
    "SAELENS_VERSION",
    "STATE",
    "STATE_JSON",
    "WEIGHTS",
    "begin_step",
    "commit_step",
    "latest_step",
    "load_config",
    "load_metadata",
    "load_sae",
    "load_step",
    "number_of",
    "read_state",
    "remove_leftovers",
    "remove_steps",
    "replace",
    "save_config",
    "save_plain",
    "save_sae",
    "save_step",
    "saved_tensors",
    "step_path",
    "unfinished_path",
    "write_json",
    "write_tensors",
]
