#!/usr/bin/env bash
# Makes the SAEs of this folder with saelab's own commands: checkpoints/build.sh [WORK]
# WORK holds text, activations and runs (21 GB). It takes hours; what is there already is used, and what was interrupted
# goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-demo/checkpoints}
cache=$work/cache grads=$work/cache-grads runs=$work/runs
middle=blocks.9.hook_resid_post
saelab() { python -m saelab "$@"; }
train() { test -e "$runs/$1/cfg.json" || saelab train "${@:2}" --out "$runs/$1" --resume; }

# ship RUN CACHE NAME [OPTIONS OF THE INDEX]: rounds to 16 bits, evaluates and indexes the rounded SAE.
ship() {
    rm -rf "${here:?}/$3"
    saelab convert "$1" "$here/$3" --to saelab --dtype float16
    saelab evaluate "$here/$3" --cache "$2" --lm-tokens 16384
    # Fewer and shorter examples than by default: the folder stays small enough to clone.
    saelab index "$here/$3" --cache "$2" --max-tokens 1000000 --band 0 --random 0 --silent 0 --hard 0 --words 8 --before 8 \
        --after 2 --bins 12 --tokens 5 --neighbours 3 --partners 1 --top "${4:-4}"
    saelab card "$here/$3"
}

mkdir -p "$work"
test -e "$work/texts.jsonl" || python "$here/texts.py" "$work/texts.jsonl"
source=(--model smollm2 --text "$work/texts.jsonl" --resume)
places=(blocks.3.hook_resid_post $middle blocks.15.hook_resid_post blocks.9.mlp.hook_in blocks.9.hook_mlp_out)
test -e "$cache/$middle/manifest.json" || saelab harvest "${source[@]}" --tokens 5500000 --hook "${places[@]}" --out "$cache"
# Gradients take a forward and a backward pass of the whole model.
test -e "$grads/manifest.json" || saelab harvest "${source[@]}" --tokens 200000 --hook $middle --gradients --out "$grads"

train topk_16384 "$cache/$middle" --variant topk --d-sae 16384 --k 32 --epochs 2
saelab sweep "$cache/$middle" "$here/grid.toml" --out "$runs/variants" --resume
for layer in 3 15; do
    train topk_layer_$layer "$cache/blocks.$layer.hook_resid_post" --variant topk --d-sae 1152 --k 32 --epochs 2
done
train topk_mlp "$cache/blocks.9.mlp.hook_in" --target "$cache/blocks.9.hook_mlp_out" --variant topk --d-sae 1152 --k 32 --epochs 2
# A twenty-fifth of the tokens, so each is seen oftener.
train gradient_topk "$grads" --variant gradient_topk --d-sae 1152 --k 32 --epochs 20

ship "$runs/topk_16384" "$cache/$middle" topk_16384 3
for config in "$runs"/variants/*/cfg.json; do
    name=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["metadata"]["saelab"]["variant"])' "$config")
    ship "$(dirname "$config")" "$cache/$middle" "$name"
done
ship "$runs/gradient_topk" "$cache/$middle" gradient_topk
for layer in 3 15; do
    ship "$runs/topk_layer_$layer" "$cache/blocks.$layer.hook_resid_post" topk_layer_$layer
done
ship "$runs/topk_mlp" "$cache/blocks.9.mlp.hook_in" topk_mlp
python "$here/table.py"
