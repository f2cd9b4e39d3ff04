#!/usr/bin/env bash
# Makes the SAEs of this folder with saelab's own commands: checkpoints/build.sh [WORK]
# WORK holds text, activations and runs (21 GB). It takes hours; what is there already is used, and what was interrupted
# goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-demo/checkpoints}
mkdir -p "$work" && cd "$work"  # so that the files of the SAEs name no folder of this machine
middle=blocks.9.hook_resid_post
saelab() { python -m saelab "$@"; }
train() { test -e "runs/$1/cfg.json" || saelab train "${@:2}" --out "runs/$1" --resume; }

# ship RUN CACHE NAME [WORDS TOKENS]: rounds to 16 bits, evaluates and indexes the rounded SAE.
ship() {
    rm -rf "${here:?}/$3"
    saelab convert "$1" "$here/$3" --to saelab --dtype float16
    saelab evaluate "$here/$3" --cache "$2" --lm-tokens 16384
    # Fewer and shorter examples and lists than by default: the folder stays small enough to clone.
    saelab index "$here/$3" --cache "$2" --max-tokens 1000000 --band 0 --random 0 --silent 0 --hard 0 --before 8 --after 2 \
        --bins 12 --top 3 --words "${4:-5}" --tokens "${5:-4}" --neighbours 3 --partners 1
    python "$here/pack.py" "$here/$3"
    saelab card "$here/$3"
}

test -e texts.jsonl || python "$here/texts.py" texts.jsonl
source=(--model smollm2 --text texts.jsonl --resume)
places=(blocks.3.hook_resid_post $middle blocks.9.mlp.hook_in blocks.9.hook_mlp_out)
test -e cache/$middle/manifest.json || saelab harvest "${source[@]}" --tokens 5500000 --hook "${places[@]}" --out cache
# 0.03 % of the tokens of this layer are attention sinks with half of the energy.
test -e cache-15/manifest.json || saelab harvest "${source[@]}" --tokens 5500000 --hook blocks.15.hook_resid_post \
    --max-norm 1000 --out cache-15
# Gradients take a forward and a backward pass of the whole model.
test -e cache-grads/manifest.json || saelab harvest "${source[@]}" --tokens 200000 --hook $middle --gradients --out cache-grads

train topk_16384 cache/$middle --variant topk --d-sae 16384 --k 32 --epochs 2
saelab sweep cache/$middle "$here/grid.toml" --out runs/variants --resume
train topk_layer_3 cache/blocks.3.hook_resid_post --variant topk --d-sae 1152 --k 32 --epochs 2
train topk_layer_15 cache-15 --variant topk --d-sae 1152 --k 32 --epochs 2
train topk_mlp cache/blocks.9.mlp.hook_in --target cache/blocks.9.hook_mlp_out --variant topk --d-sae 1152 --k 32 --epochs 2
# A twenty-fifth of the tokens, so each is seen oftener.
train gradient_topk cache-grads --variant gradient_topk --d-sae 1152 --k 32 --epochs 20

ship runs/topk_16384 cache/$middle topk_16384 4 3
for config in runs/variants/*/cfg.json; do
    name=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["metadata"]["saelab"]["variant"])' "$config")
    ship "$(dirname "$config")" cache/$middle "$name"
done
ship runs/gradient_topk cache/$middle gradient_topk
ship runs/topk_layer_3 cache/blocks.3.hook_resid_post topk_layer_3
ship runs/topk_layer_15 cache-15 topk_layer_15
ship runs/topk_mlp cache/blocks.9.mlp.hook_in topk_mlp
python "$here/table.py"
