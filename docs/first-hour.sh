#!/usr/bin/env bash
# A newcomer's first hour, step by step, with the time of each: bash docs/first-hour.sh TEXT FOLDER
# TEXT is a text file of yours, FOLDER a new folder to work in; saelab must be installed with its app and demo extras.
# SAELENS=PYTHON names an interpreter that has SAELens, to load there what was exported.
set -euo pipefail
text=$(realpath "$1")
mkdir -p "$2/log"
cd "$2"

step() {
    local name=$1 started
    shift
    started=$(date +%s.%N)
    "$@" >"log/$name" 2>&1 || { cat "log/$name" && exit 1; }
    printf '%-28s %6.1f s\n' "$name" "$(echo "$(date +%s.%N) - $started" | bc)"
}

step demo saelab demo
model=$(python -c 'from saelab.lm import smollm2_folder; print(smollm2_folder())')  # stands for a model folder of yours
step harvest saelab harvest --model "$model" --hook model.layers.3 --text "$text" --tokens 20000 --out cache
for variant in topk abs_topk matching_pursuit; do
    k=--k
    [ $variant = matching_pursuit ] && k=--n-steps
    step train-$variant saelab train cache --variant $variant $k 16 --d-sae 1024 --epochs 4 --out runs/$variant
    step evaluate-$variant saelab evaluate runs/$variant --cache cache --lm-tokens 1000
    step index-$variant saelab index runs/$variant --cache cache
done
step find-a-latent python -c '
from saelab.features import FeatureIndex
table = FeatureIndex("runs/topk").table()
print(int(table.sort_values("label_score", ascending=False).latent.iloc[0]))'
step steer saelab steer runs/topk --latent "$(tail -1 log/find-a-latent)" --strength 0.8max --prompt "Once" --compare
step export saelab convert runs/topk saelens --to saelens
[ -z "${SAELENS:-}" ] || step load-in-saelens "$SAELENS" -c 'from sae_lens import SAE; SAE.load_from_disk("saelens")'
