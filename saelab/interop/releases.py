"""SAELens' names of public SAEs, "release/id", and where their files are on the hub.

``RELEASES`` are rules; ``CANONICAL`` and ``KISSANE`` list what follows no rule. Source: the table of SAELens 6.54.12.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from saelab.errors import UserError

# Gemma Scope's SAE of each layer and width whose L0 is nearest to 100: (collection, width) -> L0 of layers 0, 1, 2, ...
# or layer:L0 where only some layers have one.
CANONICAL = {
    ("27b-pt-res", "131k"): "10:106 22:82 34:72",
    ("2b-pt-att", "16k"): "104 79 93 117 116 135 61 99 129 127 70 80 85 92 71 98 71 79 72 122 62 65 106 73 96 77",
    ("2b-pt-att", "65k"): "75 98 125 83 87 99 112 96 112 107 67 75 79 87 66 90 129 70 123 106 102 118 112 140 77 63",
    (
        "2b-pt-mlp",
        "16k",
    ): "119 105 95 95 85 114 133 60 136 88 110 98 108 112 97 80 72 68 106 109 109 113 121 128 73 126",
    ("2b-pt-mlp", "65k"): "72 127 134 68 66 86 101 115 110 77 95 88 96 98 89 72 66 136 88 88 88 86 92 102 128 107",
    ("2b-pt-res", "16k"): "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116",
    ("2b-pt-res", "1m"): "5:114 12:107 19:88",
    ("2b-pt-res", "262k"): "12:121",
    ("2b-pt-res", "32k"): "12:76",
    ("2b-pt-res", "524k"): "12:115",
    (
        "2b-pt-res",
        "65k",
    ): "73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 124 93",
    ("9b-it-res", "16k"): "9:88 20:91 31:76",
    ("9b-it-res", "131k"): "9:121 20:81 31:109",
    ("9b-pt-att", "16k"): (
        "61 77 69 102 126 125 108 70 65 71 132 67 68 77 81 79 81 110 80 86 76 86 70 80 79 73 75 136 71 76 "
        "73 73 74 78 91 77 69 82 81 77 91 129"
    ),
    ("9b-pt-att", "131k"): (
        "55 116 135 119 75 78 73 106 98 111 97 104 110 126 131 130 71 90 69 71 125 71 115 66 130 115 120 "
        "102 115 128 109 117 117 128 63 124 105 124 135 120 64 92"
    ),
    ("9b-pt-mlp", "16k"): (
        "50 128 81 126 66 93 96 101 124 83 114 76 96 94 97 107 91 104 89 98 108 88 85 73 73 72 142 126 "
        "115 111 116 94 98 107 107 108 109 119 98 90 74 126"
    ),
    ("9b-pt-mlp", "131k"): (
        "30 106 61 109 84 131 72 75 89 129 83 120 77 75 80 89 81 91 82 85 93 79 77 67 67 65 110 99 91 87 "
        "89 77 76 83 82 80 81 90 79 75 125 99"
    ),
    ("9b-pt-res", "16k"): (
        "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 114 116 "
        "118 119 119 120 114 111 114 114 120 120 124 128 131 125 113"
    ),
    ("9b-pt-res", "131k"): (
        "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 96 97 "
        "96 98 97 95 92 88 91 89 94 93 96 101 99 94 84"
    ),
    ("9b-pt-res", "1m"): "9:122 20:101 31:77",
    ("9b-pt-res", "32k"): "20:57",
    ("9b-pt-res", "524k"): "20:48",
    ("9b-pt-res", "65k"): "20:55",
}
# Coefficient, width, weight decay and version in the file names of the attention SAEs of GPT-2's twelve layers.
KISSANE = (
    ("1.80e+00", 24576, "1.00e-06", 9),
    ("8.00e-01", 24576, "1.00e-06", 5),
    ("1.00e+00", 24576, "1.00e-06", 4),
    ("9.00e-01", 24576, "1.00e-06", 9),
    ("1.10e+00", 24576, "1.00e-06", 7),
    ("1.00e+00", 49152, "1.00e-06", 9),
    ("1.10e+00", 24576, "1.00e-06", 9),
    ("1.10e+00", 49152, "1.00e-06", 9),
    ("1.30e+00", 24576, "1.00e-05", 6),
    ("1.20e+00", 24576, "1.00e-06", 9),
    ("1.30e+00", 24576, "1.00e-05", 9),
    ("3.00e+00", 24576, "3.16e-06", 9),
)

# SAELens' names "release/id", and where the files are: "owner/repository/path". {PLACE} is {place} in capitals.
# Gemma Scope 2: SAELens' word for a place -> folder of the repository.
PLACES = (("res", "resid_post"), ("mlp", "mlp_out"), ("att", "attn_out"), ("transcoders", "transcoder"))
RELEASES: tuple[tuple[str, str], ...] = (
    *(
        (
            rf"gemma-scope-2-(?P<size>\d+[mb])-(?P<tuning>pt|it)-{short}(?P<all>-all)?/(?:{folder}/)?(?P<id>layer_.+)",
            "google/gemma-scope-2-{size}-{tuning}/" + folder + "{all_}/{id}",
        )
        for short, folder in PLACES
    ),
    (r"gpt2-small-res-jb/(?P<id>.+)", "jbloom/GPT2-Small-SAEs-Reformatted/{id}"),
    (r"gpt2-small-res-jb-feature-splitting/(?P<id>.+)", "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8/{id}"),
    (
        r"gpt2-small-resid-post-v5-32k/blocks\.(?P<layer>\d+)\..+",
        "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_{layer}.pt",
    ),
    (
        r"gpt2-small-(?P<place>resid-post|resid-mid|mlp-out|attn-out)-v5-(?P<width>32|128)k/blocks\.(?P<layer>\d+)\..+",
        "jbloom/GPT2-Small-OAI-v5-{width}k-{place}-SAEs/v5_{width}k_layer_{layer}",
    ),
    (
        r"llama_scope_lx(?P<place>[ram])_(?P<times>\d+)x/l(?P<layer>\d+)[ram]_\d+x",
        "fnlp/Llama3_1-8B-Base-LX{PLACE}-{times}x/Llama3_1-8B-Base-L{layer}{PLACE}-{times}x",
    ),
    (
        r"mistral-7b-res-wg/blocks\.(?P<layer>\d+)\..+",
        "JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_{layer}",
    ),
    (
        r"goodfire-llama-3\.3-70b-instruct/layer_50",
        "Goodfire/Llama-3.3-70B-Instruct-SAE-l50/Llama-3.3-70B-Instruct-SAE-l50.pt",
    ),
    (
        r"goodfire-llama-3\.1-8b-instruct/layer_19",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth",
    ),
    (
        r"gemma-2-2b-res-matryoshka-dc/(?P<id>.+)",
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40/standard/{id}",
    ),
    (r"gemma-2-9b-res-matryoshka-dc/(?P<id>.+)", "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60/{id}"),
    (
        r"gpt2-small-res_(?P<place>\w+)-ajt/blocks\.(?P<layer>\d+)\.hook_resid_pre",
        "neuronpedia/gpt2-small__res_{place}-ajt/{layer}-res_{place}-ajt",
    ),
    (r"llama-3-8b-it-res-jh/(?P<id>.+)", "Juliushanhanhan/llama-3-8b-it-res/{id}"),
    (
        r"llama_scope_r1_distill/l(?P<layer>\d+)r_800m_slimpajama",
        "fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L{layer}R",
    ),
    (
        r"llama_scope_r1_distill/l(?P<layer>\d+)r_400m_slimpajama_400m_openr1_math",
        "fnlp/Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L{layer}R",
    ),
    (
        r"llama_scope_r1_distill/l(?P<layer>\d+)r_800m_openr1_math",
        "fnlp/Llama-Scope-R1-Distill/0-Slimpajama-800M-OpenR1-Math-220k/L{layer}R",
    ),
    (
        r"pythia-70m-deduped-res-sm/blocks\.0\.hook_resid_pre",
        "ctigges/pythia-70m-deduped__res-sm_processed/e-res-sm",
    ),
    (
        r"pythia-70m-deduped-(?P<place>att|mlp|res)-sm/blocks\.(?P<layer>\d+)\.hook_(attn_out|mlp_out|resid_post)",
        "ctigges/pythia-70m-deduped__{place}-sm_processed/{layer}-{place}-sm",
    ),
    # SAEBench's: of a training's checkpoints the step is in the name.
    *(
        (
            rf"sae_bench_{run}/blocks\.(?P<layer>\d+)\.hook_resid_post__(?P<id>trainer_\d+{step})",
            f"canrager/{repository}/{folder}/resid_post_layer_{{layer}}{checkpoints}/{{id}}",
        )
        for run, repository, folder in (
            (
                r"(?P<run>gemma-2-2b_(topk|vanilla))_(?P<width>width-2pow\d+_date-1109)",
                "saebench_gemma-2-2b_{width}",
                "{run}_{width}",
            ),
            (r"(?P<run>pythia70m_sweep_\w+?_ctx128_\d+)", "lm_sae", "{run}"),
        )
        for step, checkpoints in ((r"", ""), (r"_step_\d+", "_checkpoints"))
    ),
    (
        r"saebench_gemma-2-2b_width-2pow12_date-0108/blocks\.(?P<layer>\d+)\.hook_resid_post__(?P<id>trainer_\d+)",
        "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108/MatryoshkaBatchTopK_gemma-2-2b__0108/"
        "resid_post_layer_{layer}/{id}",
    ),
    (
        r"saebench_gemma-2-2b_(?P<width>width-2pow1[46]_date-0107)/blocks\.(?P<layer>\d+)\.hook_resid_post__"
        r"(?P<id>trainer_\d+)",
        "canrager/saebench_gemma-2-2b_{width}/gemma-2-2b_matryoshka_batch_top_k_{width}/resid_post_layer_{layer}/{id}",
    ),
    (
        r"gemma-2-2b-res-snap-matryoshka-dc/(?P<id>.+)",
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40/snap/{id}",
    ),
    (r"gemma-3-1b-res-matryoshka-dc/(?P<id>.+)", "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40/{id}"),
    (
        r"(?P<base>llama-3\.1-8b-instruct|qwen2\.5-7b-instruct|gpt-oss-20b)-andyrdt/"
        r"resid_post_layer_(?P<layer>\d+)_(?P<id>trainer_\d+)",
        "andyrdt/saes-{base}/resid_post_layer_{layer}/{id}",
    ),
    (
        r"deepseek-r1-distill-llama-8b-qresearch/blocks\.19\.hook_resid_post",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
    ),
    (
        r"gemma-2b-it-res-jb/(?P<id>blocks\.12\.hook_resid_post)",
        "jbloom/Gemma-2b-IT-Residual-Stream-SAEs/gemma_2b_it_{id}_16384",
    ),
    (
        r"gemma-2b-res-jb/(?P<id>blocks\.0\.hook_resid_post)",
        "jbloom/Gemma-2b-Residual-Stream-SAEs/gemma_2b_{id}_16384_anthropic",
    ),
    (
        r"gemma-2b-res-jb/(?P<id>blocks\.6\.hook_resid_post)",
        "jbloom/Gemma-2b-Residual-Stream-SAEs/gemma_2b_{id}_16384_anthropic_fast_lr",
    ),
    (
        r"gemma-2b-res-jb/(?P<id>blocks\.1[027]\.hook_resid_post)",
        "jbloom/Gemma-2b-Residual-Stream-SAEs/gemma_2b_{id}_16384",
    ),
)


# Names that rules do not give: the function gets the groups of the match.
BY_TABLE: tuple[tuple[str, Callable[[dict[str, str]], str]], ...] = (
    (
        r"gemma-scope-(?P<collection>(?!2-)[\w-]+?)(-canonical)?/layer_(?P<layer>\d+)/width_(?P<width>\w+)/canonical",
        lambda found: canonical(found["collection"], int(found["layer"]), found["width"]),
    ),
    (r"gpt2-small-hook-z-kk/blocks\.(?P<layer>\d|1[01])\.hook_z", lambda found: kissane(int(found["layer"]))),
    (r"gpt2-small-mlp-tm/(?P<id>blocks\.(?P<layer>\d|1[01])\.hook_mlp_out)", lambda found: mcgrath(**found)),
    (
        r"qwen-scope-(?P<base>[\w.-]+)-(?P<width>w\d+k)-l(?P<l0>\d+)/layer(?P<layer>\d+)",
        lambda found: qwen(**found),
    ),
)
NO_SAES = {
    r"mwhanna-qwen3-[\w.-]+-transcoders(-lowl0)?/.+": "transcoders",
    r"mntss-[\w.-]+-clt-as-per-layer/.+": "cross-layer transcoders",
    r"temporal-sae-[\w.-]+/.+": "temporal SAEs",
}


def place(name: str) -> str | None:
    """``owner/repository/path`` of what SAELens calls ``release/id``; None for another name.

    UserError for a release of something else than SAEs.
    """
    for pattern, what in NO_SAES.items():
        if re.fullmatch(pattern, name):
            raise UserError(f"{name.partition('/')[0]} holds {what}, not SAEs; give the name of an SAE")
    for pattern, make in BY_TABLE:
        if match := re.fullmatch(pattern, name):
            return make(match.groupdict())
    for pattern, where in RELEASES:
        if match := re.fullmatch(pattern, name):
            groups = {key: value or "" for key, value in match.groupdict().items()}
            groups["all_"] = "_all" if groups.get("all") else ""
            return where.format(**groups, **{k.upper(): v.upper() for k, v in groups.items()})
    return None


def canonical(collection: str, layer: int, width: str) -> str:
    """Where the SAE is that SAELens calls canonical. UserError where there is none of this layer and width."""
    listed = CANONICAL.get((collection, width), "").split()
    pairs = [pair.split(":") if ":" in pair else (str(i), pair) for i, pair in enumerate(listed)]
    found = {int(number): l0 for number, l0 in pairs}
    if layer not in found:
        widths = ", ".join(f"width_{w}" for c, w in CANONICAL if c == collection)
        what = f"layers {', '.join(map(str, found))}" if found else widths or "no such names"
        raise UserError(
            f"gemma-scope-{collection} has no canonical SAE of layer_{layer}/width_{width}: it has {what}; "
            "give its full name, such as layer_12/width_16k/average_l0_82"
        )
    return f"google/gemma-scope-{collection}/layer_{layer}/width_{width}/average_l0_{found[layer]}"


def kissane(layer: int) -> str:
    """Where the SAE of the attention heads' outputs of a layer of GPT-2 small is."""
    coefficient, width, decay, version = KISSANE[layer]
    settings = f"lr1.20e-03_l1{coefficient}_ds{width}_bs4096_dc{decay}_rsanthropic_rie25000_nr4_v{version}"
    return f"ckkissane/attn-saes-gpt2-small-all-layers/gpt2-small_L{layer}_Hcat_z_{settings}.pt"


def mcgrath(id: str, layer: str) -> str:
    """Where the SAE of an MLP's output of GPT-2 small is."""
    version = {"0": 1, "8": 1, "11": 2}.get(layer, 0)
    return f"tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_{id}_24576:v{version}"


def qwen(base: str, width: str, l0: str, layer: str) -> str:
    """Where the SAE of a layer of Qwen Scope is."""
    number, *rest = base.split("-")
    name = "-".join([f"Qwen{number}", *("Base" if part == "base" else part.upper() for part in rest)])
    return f"Qwen/SAE-Res-{name}-{width.upper()}-L0_{l0}/layer{layer}.sae.pt"
