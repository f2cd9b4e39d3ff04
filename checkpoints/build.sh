#!/usr/bin/env bash
# Trains every SAE of this folder with saelab's own commands: checkpoints/build.sh [CACHE [CACHE_WITH_GRADIENTS [RUNS]]]
# Missing caches are harvested, which takes minutes, more with gradients; what is there already is used.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${1:-demo/cache} grads=${2:-demo/cache-grads} runs=${3:-runs/checkpoints}
saelab() { python -m saelab "$@"; }

source=(--model smollm2 --hook blocks.9.hook_resid_post --text wiki-sample)
test -e "$cache/manifest.json" || saelab harvest "${source[@]}" --tokens 200000 --out "$cache" --resume
test -e "$grads/manifest.json" || saelab harvest "${source[@]}" --tokens 30000 --gradients --out "$grads" --resume

saelab sweep "$cache" "$here/grid.toml" --out "$runs" --resume
# Gradients are slow to harvest, so this one sees a seventh of the tokens seven times as often.
saelab train "$grads" --variant gradient_topk --d-sae 1152 --k 32 --epochs 65 --out "$runs/gradient_topk" --resume

for config in "$runs"/*/cfg.json; do
    run=$(dirname "$config")
    name=$(python -c 'import json, sys; c = json.load(open(sys.argv[1])); print(c["metadata"]["saelab"]["variant"])' "$config")
    band=1
    case $run in *4608*) name=${name}_4608 band=0 ;; esac
    rm -rf "${here:?}/$name"
    saelab convert "$run" "$here/$name" --to saelab --dtype float16
    saelab evaluate "$here/$name" --cache "$cache" --lm-tokens 4096
    # Fewer and shorter examples than by default: the folder stays small enough to clone.
    saelab index "$here/$name" --cache "$cache" --top 5 --band $band --random 0 --silent 1 --hard 0 --words 12 --before 8 --after 2 --bins 20 \
        --tokens 6 --neighbours 5 --partners 2
    saelab card "$here/$name"
done
python "$here/table.py"
