"""Public collections of SAEs: what their files do not say of themselves, as a table.

An entry says which model a collection belongs to, where in the model its SAEs read, and on which text positions they
were trained, so far as its authors published it. ``Collection.hooks`` is read like a list of rules: the first pattern
that is found in ``REPOSITORY/PATH`` gives the hook point.

Sources: the collections' repositories and papers, and SAELens 6.54.12.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelab.interop import releases
from saelab.interop.foreign import Foreign
from saelab.interop.origin import Origin

LAYER = r"layer_(?P<layer>\d+)"


@dataclass(frozen=True)
class Collection:
    """One collection of SAEs.

    Attributes:
        name: What its authors call it.
        format: The format of its files; others are not looked up here.
        owner: Of its repositories on the hub.
        repository: Pattern of their names. Its groups, and those of the hooks' patterns, fill the braces below.
        model: The language model, as the hub calls it.
        hooks: (pattern of ``REPOSITORY/PATH``, hook point).
        facts: ``context_size`` in tokens and ``prepend_bos``; for SAELens' files, settings that replace those of the
            configuration, and ``input_scales``, a factor per layer that the activations were multiplied by.
    """

    name: str
    format: str
    owner: str
    repository: str
    model: str = ""
    hooks: tuple[tuple[str, str], ...] = ()
    facts: tuple[tuple[str, Any], ...] = ()


GPT2 = "openai-community/gpt2"
# What the activations of each layer were multiplied by in training.
MLP_SCALES = (
    *(1.049317316, 2.369398401, 1.641193498, 1.895852216, 1.816734787, 1.550234472),
    *(1.323774281, 1.104290511, 0.912376278, 0.695533564, 0.361972893, 0.285154865),
)
CENTRED = (("model_from_pretrained_kwargs", {"center_writing_weights": True}),)
BOS_1024 = (("context_size", 1024), ("prepend_bos", True))

COLLECTIONS = (
    Collection(
        "Gemma Scope",
        "gemma_scope",
        "google",
        r"gemma-scope-(?P<size>2b|9b|27b)-(?P<tuning>pt|it)-(res|mlp|att|transcoders)",
        "google/gemma-2-{size}{tuned}",
        (
            (r"-res/embedding", "hook_embed"),
            (rf"-res/{LAYER}/", "blocks.{layer}.hook_resid_post"),
            (rf"-mlp/{LAYER}/", "blocks.{layer}.hook_mlp_out"),
            (rf"-att/{LAYER}/", "blocks.{layer}.attn.hook_z"),
        ),
        BOS_1024,
    ),
    Collection(
        "Gemma Scope 2",
        "gemma_scope",
        "google",
        r"gemma-scope-2-(?P<size>270m|1b|4b|12b|27b)-(?P<tuning>pt|it)",
        "google/gemma-3-{size}-{tuning}",
        (
            (rf"/resid_post(_all)?/{LAYER}_", "blocks.{layer}.hook_resid_post"),
            (rf"/mlp_out(_all)?/{LAYER}_", "blocks.{layer}.hook_mlp_out"),
            (rf"/attn_out(_all)?/{LAYER}_", "blocks.{layer}.attn.hook_z"),
        ),
        BOS_1024,
    ),
    Collection(
        "Llama Scope",
        "llama_scope",
        "fnlp",
        r"Llama3_1-8B-Base-L(X|\d+)(R|A|M|TC)-\d+x",
        "meta-llama/Llama-3.1-8B",
        facts=BOS_1024,
    ),
    Collection(
        "Llama Scope R1 Distill",
        "llamascopium",
        "fnlp",
        r"Llama-Scope-R1-Distill",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        facts=BOS_1024,
    ),
    Collection(
        "Qwen Scope",
        "qwen_scope",
        "Qwen",
        r"SAE-Res-(?P<base>Qwen.+)-W\d+K-L0_\d+",
        "Qwen/{base}",
        ((r"/layer(?P<layer>\d+)\.sae\.pt$", "blocks.{layer}.hook_resid_post"),),
    ),
    Collection(
        "Goodfire",
        "goodfire",
        "Goodfire",
        r"(?P<base>Llama-3\.\d-\d+B-Instruct)-SAE-l\d+(\.pth?)?",
        "meta-llama/{base}",
        ((r"-SAE-l(?P<layer>\d+)", "blocks.{layer}.hook_resid_post"),),
    ),
    Collection(
        "qresearch",
        "qresearch",
        "qresearch",
        r"DeepSeek-R1-Distill-Llama-8B-SAE-l\d+(\.pt)?",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        facts=BOS_1024,
    ),
    Collection(
        "GPT-2 attention outputs (Kissane)",
        "nanda",
        "ckkissane",
        r"attn-saes-gpt2-small-all-layers",
        GPT2,
        ((r"/gpt2-small_L(?P<layer>\d+)_Hcat_z_", "blocks.{layer}.attn.hook_z"),),
        (("context_size", 128), ("prepend_bos", True)),
    ),
    Collection(
        "OpenAI's GPT-2 small SAEs",
        "openai",
        "",
        r"gpt2-small",
        GPT2,
        (
            (r"/resid_post_mlp_v\w+/autoencoders/(?P<layer>\d+)\.pt$", "blocks.{layer}.hook_resid_post"),
            (r"/resid_post_attn_v\w+/autoencoders/(?P<layer>\d+)\.pt$", "blocks.{layer}.hook_resid_mid"),
            (r"/resid_delta_mlp_v\w+/autoencoders/(?P<layer>\d+)\.pt$", "blocks.{layer}.hook_mlp_out"),
            (r"/resid_delta_attn_v\w+/autoencoders/(?P<layer>\d+)\.pt$", "blocks.{layer}.hook_attn_out"),
            (r"/mlp_post_act(_v\w+)?/autoencoders/(?P<layer>\d+)\.pt$", "blocks.{layer}.mlp.hook_post"),
        ),
        (("context_size", 64), ("prepend_bos", False)),
    ),
    Collection(
        "GPT-2 residual stream (Bloom)", "saelens", "jbloom", r"GPT2-Small-SAEs(-Reformatted)?", GPT2, facts=CENTRED
    ),
    Collection(
        "GPT-2 feature splitting (Bloom)",
        "saelens",
        "jbloom",
        r"GPT2-Small-Feature-Splitting-Experiment-Layer-8",
        GPT2,
        facts=CENTRED,
    ),
    Collection(
        "GPT-2 MLP outputs (McGrath)",
        "saelens",
        "tommmcgrath",
        r"gpt2-small-mlp-out-saes",
        GPT2,
        ((r"blocks\.(?P<layer>\d+)\.hook_mlp_out", "blocks.{layer}.hook_mlp_out"),),
        (*CENTRED, ("input_scales", MLP_SCALES)),
    ),
    Collection(
        "Mistral 7B residual stream (Engels)",
        "saelens",
        "JoshEngels",
        r"Mistral-7B-Residual-Stream-SAEs",
        "mistralai/Mistral-7B-v0.1",
        facts=(("normalize_activations", "constant_norm_rescale"),),
    ),
    Collection(
        "Llama 3 8B (EleutherAI)", "sparsify", "EleutherAI", r"sae-llama-3-8b-32x(-v2)?", "meta-llama/Meta-Llama-3-8B"
    ),
    Collection(
        "Llama 3.1 8B (EleutherAI)", "sparsify", "EleutherAI", r"sae-llama-3\.1-8b-\d+x", "meta-llama/Llama-3.1-8B"
    ),
    Collection(
        "Pythia (EleutherAI)",
        "sparsify",
        "EleutherAI",
        r"sae-(?P<base>pythia-[\w.]+?(-deduped)?)-\d+k",
        "EleutherAI/{base}",
    ),
)

# TransformerLens' names of models, which SAELens' files record, and the hub's.
MODELS: tuple[tuple[str, str], ...] = (
    (r"gpt2-small", GPT2),
    (r"gpt2(-medium|-large|-xl)?", "openai-community/{name}"),
    (r"pythia-[\w.-]+", "EleutherAI/{name}"),
    (r"gemma-(2-)?\d+b(-it)?", "google/{name}"),
    (r"mistral-7b", "mistralai/Mistral-7B-v0.1"),
    (r"gpt-neo-[\w.]+", "EleutherAI/{name}"),
    (r"qwen3-(?P<size>[\w.]+)b", "Qwen/Qwen3-{size}B"),
)


class Member(NamedTuple):
    """A file or folder of a collection: what the table says of it, and by which name it was recognised."""

    collection: Collection
    metadata: dict[str, Any]
    facts: dict[str, Any]
    evidence: str


def find(path: Path, form: str) -> Member | None:
    """The member of a collection of the format ``form`` that ``path`` is by its names; None where it is in none."""
    for repository, inside in Origin.of(path).splits():
        for collection in COLLECTIONS:
            match = re.fullmatch(collection.repository, repository)
            if match and collection.format == form:
                return _member(collection, repository, inside, match.groupdict())
    return None


def _member(collection: Collection, repository: str, inside: str, groups: dict[str, str]) -> Member:
    place = f"{repository}/{inside}"
    facts = dict(collection.facts)
    groups = {"tuned": "-it" if groups.get("tuning") == "it" else "", **groups}
    model = collection.model.format(**groups)
    metadata = {"model_name": model.replace("gemma-3-270m-pt", "gemma-3-270m")}
    metadata |= {name: facts.pop(name) for name in ("context_size", "prepend_bos") if name in facts}
    for pattern, hook in collection.hooks:
        if match := re.search(pattern, f"{place}/" if pattern.endswith("/") else place):
            metadata["hook_name"] = hook.format(**match.groupdict())
            if "input_scales" in facts:
                facts["input_scale"] = facts["input_scales"][int(match["layer"])]
            break
    facts.pop("input_scales", None)
    return Member(collection, metadata, facts, f"the table of collections ({collection.name}), by the name {place}")


def complete(foreign: Foreign, path: Path) -> None:
    """Add what the table knows of ``path`` to the metadata of ``foreign``, and say of each entry where it is from.

    What the files record stays. A hook point that differs from the table's is a note.
    """
    known = foreign.known_from
    known |= {name: "its files" for name, value in foreign.metadata.items() if value is not None and name not in known}
    member = find(path, foreign.format)
    if member is None:
        return
    for name, value in member.metadata.items():
        if foreign.metadata.get(name) is None:
            foreign.metadata[name], known[name] = value, member.evidence
    foreign.metadata.setdefault("collection", member.collection.name)
    expected, found = member.metadata.get("hook_name"), foreign.metadata.get("hook_name")
    if expected and found != expected:
        foreign.notes.append(f"its files say it reads {found}, {member.evidence} it reads {expected}")


def model_on_hub(name: str) -> str:
    """The hub's name of a model that is called by TransformerLens' name; another name, or that of a folder, itself."""
    for pattern, place in MODELS:
        if (match := re.fullmatch(pattern, name)) and not Path(name).exists():
            return place.format(name=name, **match.groupdict())
    return name


def on_hub(name: str) -> str | None:
    """``owner/repository/path`` of an SAE that is called by its collection's name, None for another name.

    ``name`` is ``repository/path`` without the owner, or SAELens' ``release/id``.
    """
    if found := releases.place(name):
        return found
    first, _, inside = name.partition("/")
    for collection in COLLECTIONS:
        if inside and collection.owner and re.fullmatch(collection.repository, first):
            return f"{collection.owner}/{name}"
    return None
