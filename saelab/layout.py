"""Names of the files and folders that saelab writes.

Names inside the folders of other tools are defined with their formats in :mod:`saelab.interop.formats`.
"""

from __future__ import annotations

# A run folder
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"  # as SAELens calls them
EXTRA = "saelab_extra.safetensors"  # running statistics, training thresholds: what SAELens does not know
RUN = "run.json"  # what is trained, on which data; written before the first step
METRICS = "metrics.jsonl"  # one line per training step
TENSORBOARD = "tensorboard"  # a folder
WANDB = "wandb.json"  # the id of the run in wandb
EVALUATION = "evaluation.json"
EXPLANATIONS = "explanations.json"  # outside the index, so that building it again keeps them
LABELS = "labels.parquet"  # imported ones; outside the index for the same reason
NOTES = "notes.json"
MAP = "map.parquet"  # where each latent lies on the map
SOURCE = "saelab_source.json"  # in a copy of another tool's SAE: the repository and the path it is from
CONTROLS = "controls"  # a folder: SAEs trained as controls of this one, which are no runs of their own
STABILITY = "stability.json"  # of each latent, how many other seeds have it
LOGIT_LENS = "logit_lens.safetensors"
CARD = "README.md"  # the model card

# In a run folder: checkpoints while it is being trained
CHECKPOINTS = "checkpoints"
TRAIN_STATE, TRAIN_SCALARS = "train_state.safetensors", "train_state.json"

# In a run folder: the feature index
INDEX = "features"
FEATURES, EXAMPLES = "features.parquet", "examples.parquet"

# A sweep's folder, beside one run folder per SAE
SWEEP = "sweep.json"  # the grid, the cache, which runs were stopped, and the learning rates that were tried
SWEEP_TABLE = "sweep.parquet"  # there once the sweep is finished
SWEEP_SUMMARY = "sweep_summary.parquet"  # means over seeds
SWEEP_DIFFERENCES = "sweep_differences.parquet"  # between groups of SAEs, on the same seeds and documents
SWEEP_REPORT = "report.html"

# A folder of runs
COLLECTIONS = "collections.json"  # named sets of latents

# An evaluation of steering
STEER_EVAL = "steer_eval.json"
STEER_REPORT = "report.html"

# A steering recipe
RECIPE, VECTORS = "recipe.json", "vectors.safetensors"

# An activation cache
MANIFEST = "manifest.json"  # there once the cache is complete
TOKENS = "tokens.json"  # the vocabulary's strings

# A rolling cache, beside the files of the kept documents' cache
ROLLING = "rolling.json"  # the settings of the stream, and what each segment held
SEGMENTS = "segments"  # a folder: a cache for each segment that is on disk
