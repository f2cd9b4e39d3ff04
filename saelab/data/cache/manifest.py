"""The manifest of an activation cache: what the activations are, where they come from, and their statistics."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saelab.devices import DTYPES
from saelab.errors import UserError, damaged, near_matches
from saelab.layout import MANIFEST

FORMAT = "saelab.activations"
VERSION = 1
PARTIAL = "manifest.partial.json"  # exists while the cache is being written; see partial_name
OTHERS = "manifest.partial-"  # prefix of the files in which the other processes record their shards
REMEDY = "restore it or harvest the cache again"


def partial_name(rank: int) -> str:
    """Name of the file in which one of several writing processes records its shards."""
    return PARTIAL if rank == 0 else f"{OTHERS}{rank}.json"


@dataclass
class ShardInfo:
    """One ``shard_*.safetensors``: its size on disk, and how many rows, tokens and contexts it holds."""

    file: str
    rows: int
    tokens: int  # tokens of text behind the rows: skipped and filtered positions count here
    contexts: int
    sha256: str
    bytes: int
    document_offset: int = 0  # added to the document numbers in the file; non-zero after a merge

    @property
    def number(self) -> int:
        """Place of the shard in the cache, from 0."""
        return int(self.file.removeprefix("shard_").partition(".")[0])


@dataclass
class Manifest:
    """Everything that a reader needs to know before it opens a shard.

    Norms are Euclidean norms of one row. Statistics are float64 sums over the rows of the training split, taken
    from the values as stored. ``scale`` is ``2 ** round(-log2(sqrt(variance)))``: a power of two, so that scaling the
    activations by it and folding it back into weights are exact. It is always computed from ``variance``, whatever the
    file says.
    """

    d_in: int
    dtype: str = "float32"
    context_length: int = 1  # tokens in a context; the last context of a shard may be shorter
    model: str = ""
    revision: str = ""
    model_dtype: str = ""  # precision the model ran in; "" before 0.2.0
    weights_fingerprint: str = ""
    weights_rounded: dict[str, str] = field(default_factory=dict)  # fingerprints of the weights rounded to these dtypes
    tokenizer: str = ""
    tokenizer_hash: str = ""
    text: str = ""
    text_fingerprint: str = ""
    hook_name: str = ""  # TransformerLens name, e.g. blocks.9.hook_resid_post
    hf_hook_name: str = ""  # the same point in the Hugging Face model, e.g. model.layers.9
    side: str = ""  # "out" or "in": output or first input of that module; "inner": neither; "" before 0.2.0
    bos: str = "none"  # "context", "document" or "none"
    separator: str = "none"  # the token between two documents, which has no row; "none" also before 0.2.0
    kept_roles: list[str] = field(default_factory=list)  # of chats: other tokens have no row; empty where all have
    skip_first: int = 0  # positions at the start of each context that have no row
    max_norm: float | None = None  # rows with a larger norm were dropped
    grad_scale: float | None = None  # stored gradients = gradients x this power of two; None without gradients
    held_out_fraction: float = 0.05  # of the contexts, from the end; about so many, as whole documents are held out
    held_out_from: int = 0  # first held-out row; filled in at the end, as all below
    train_until: int | None = None  # rows from here to held_out_from: a context with documents of both, in no split
    mean: list[float] = field(default_factory=list)
    rms_norm: float = 0.0  # sqrt(mean ||x||^2)
    mean_norm: float = 0.0  # mean ||x||
    variance: float = 0.0  # mean ||x - mean||^2, summed over dimensions
    scale: float = 1.0
    n_documents: int = 0
    roles: list[str] = field(default_factory=list)  # names of the numbers in the shards' "roles"; empty without chats
    left_out: dict[str, int] = field(default_factory=dict)  # records and files of the text not read, by reason
    settings: dict[str, Any] = field(default_factory=dict)  # what else a resumed harvest must agree on
    shards: list[ShardInfo] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Stored activations, over both splits."""
        return sum(shard.rows for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Tokens of text behind the rows."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def n_contexts(self) -> int:
        """Contexts that the rows come from."""
        return sum(shard.contexts for shard in self.shards)

    @property
    def train_rows(self) -> int:
        """Rows that are trained on: the first ones."""
        return self.held_out_from if self.train_until is None else self.train_until

    @property
    def dropped_rows(self) -> int:
        """Tokens without a row, besides the skipped ones: see ``DROPPED``."""
        return self.n_tokens - self.n_contexts * self.skip_first - self.n_rows

    @property
    def has_grads(self) -> bool:
        """Whether gradients are stored."""
        return self.grad_scale is not None

    def identity(self) -> dict[str, Any]:
        """The fields in which two harvests must agree for one to continue the other: all but progress and results.

        ``side`` follows from the hook name and the other two from the weights; folders begun before 0.2.0 lack them.
        """
        data = asdict(self)
        later = ("side", "model_dtype", "weights_rounded")
        for name in (*later, "shards", "mean", "n_documents", "roles", "left_out", "grad_scale", *_RESULTS):
            data.pop(name)
        return data

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse a manifest. Raises UserError if it is not one, or of another format version."""
        with damaged(f"{where}/{MANIFEST}", REMEDY):
            data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise UserError(f"{where}/{MANIFEST} is not the manifest of an activation cache; name the folder of one")
        if (version := data.pop("version", None)) != VERSION:
            raise UserError(f"{where} has cache format {version}, this saelab reads {VERSION}; harvest it again")
        known = {f.name for f in fields(cls)}
        if missing := sorted({"d_in", "dtype", "shards"} - data.keys()):
            raise UserError(f"{where}/{MANIFEST} lacks {', '.join(missing)}; harvest the cache again")
        with damaged(f"{where}/{MANIFEST}", REMEDY):
            shards = [ShardInfo(**shard) for shard in data.pop("shards")]
            manifest = cls(**{k: v for k, v in data.items() if k in known}, shards=shards)
            manifest.check()
            manifest.scale = scale_for(manifest.variance)  # version 0.1.0 stored that of the norm before centring
        return manifest

    def check(self) -> None:
        """Raise ValueError for a field with which the shards could not be found and read."""
        counts = {name: getattr(self, name) for name in ("d_in", "context_length")}
        for shard in self.shards:
            Path(shard.file).relative_to(Path(shard.file).name)  # a shard lies in the folder, not elsewhere
            counts |= {
                f"{name} of {shard.file}": getattr(shard, name) for name in ("rows", "tokens", "contexts", "bytes")
            }
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
        if self.side not in ("", "in", "out", "inner"):
            raise ValueError(f"side is {self.side!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}")
        if self.mean and len(self.mean) != self.d_in:
            raise ValueError(f"mean has {len(self.mean)} entries")
        numbers = [self.rms_norm, self.mean_norm, self.variance, self.scale, self.held_out_fraction, *self.mean]
        if not all(math.isfinite(value) for value in numbers) or self.scale <= 0:
            raise ValueError("its statistics are not finite")
        if not 0 <= self.train_rows <= self.held_out_from:
            raise ValueError(f"train_until is {self.train_until}, held_out_from {self.held_out_from}")
        if not 0 <= self.held_out_from <= self.n_rows or not 0 <= self.skip_first < max(self.context_length, 1):
            raise ValueError(f"held_out_from is {self.held_out_from}, skip_first {self.skip_first}")

    def fingerprint(self) -> str:
        """A hash that changes with the activations, with their provenance and with the held-out rows.

        It covers the fields that identify the data and no others, so that a field added to the manifest later does not
        change the fingerprints of existing caches, which runs refer to.
        """
        shards = [(s.sha256, s.rows, s.tokens, s.contexts, s.document_offset) for s in self.shards]
        about = {name: getattr(self, name) for name in IDENTIFYING}
        if self.train_until is not None:
            about["train_until"] = self.train_until
        return hashlib.sha256(json.dumps([about, shards], sort_keys=True).encode()).hexdigest()[:16]

    def set_statistics(self, rows: int, total: list[float], sum_sq: float, sum_norm: float) -> None:
        """Fill in mean, norms, variance and scale from float64 sums over ``rows`` training rows."""
        self.mean = [value / rows for value in total]
        mean_sq = sum_sq / rows
        self.rms_norm = math.sqrt(mean_sq)
        self.mean_norm = sum_norm / rows
        self.variance = max(mean_sq - math.fsum(m * m for m in self.mean), 0.0)
        self.scale = scale_for(self.variance)


DROPPED = "separators, BOS tokens of documents, tokens of roles that are not kept, and norms above max_norm"
IDENTIFYING = (
    *("d_in", "dtype", "context_length", "model", "revision", "weights_fingerprint", "tokenizer_hash"),
    *("text_fingerprint", "hook_name", "bos", "skip_first", "max_norm", "grad_scale", "held_out_from"),
)
_RESULTS = ("held_out_from", "train_until", "rms_norm", "mean_norm", "variance", "scale")
PROVENANCE = (
    *("model", "revision", "model_dtype", "weights_fingerprint", "weights_rounded"),
    *("tokenizer", "tokenizer_hash", "text", "text_fingerprint"),
    *("hook_name", "hf_hook_name", "side", "bos", "skip_first", "max_norm", "settings"),
)


def check_provenance(names: dict[str, Any]) -> None:
    """Refuse manifest fields that a caller may not set or that do not exist."""
    for name in names:
        if name not in PROVENANCE:
            raise UserError(f"unknown manifest field {name!r}; {near_matches(name, PROVENANCE)}")


def power_of_two(value: float) -> float:
    """The power of two nearest to ``value > 0`` on a logarithmic scale."""
    return 2.0 ** round(math.log2(value))


def scale_for(variance: float) -> float:
    """The power of two by which activations come close to a variance of 1, summed over dimensions."""
    return power_of_two(variance**-0.5) if variance > 0 else 1.0
