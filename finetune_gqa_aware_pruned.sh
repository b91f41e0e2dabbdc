#!/usr/bin/env bash
# Recovery training of a GQA-aware pruned model by LoRA, then the merged checkpoint.
#
#   bash finetune_gqa_aware_pruned.sh [NAME] [flags of post_training.py]
#
#   bash finetune_gqa_aware_pruned.sh gqa --data_dir TEXTS
#   bash finetune_gqa_aware_pruned.sh gqa --finetune_samples 2000 --kd_weight 0.5
#   bash finetune_gqa_aware_pruned.sh headline --preset headline --dataset alpaca.json     # the authors' recipe
#
# NAME: what run_gqa_aware_pruning.sh was given as --output_name (gqa). A run that was killed goes on where it was.
# Results: results/NAME_lora (adapters), results/NAME_merged (an ordinary checkpoint); perplexities before and after
# in results/NAME_lora/stage.json. Training of all weights, other folders and other names: python post_training.py and
# python merge_and_save_lora.py. All flags are checked before any work.
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
name=gqa
if [[ $# -gt 0 && "$1" != -* ]]; then name=$1; shift; fi

refuse() { echo "error: $1" >&2; exit 2; }
case "$name" in
    '' | . | .. | */*) refuse "NAME '$name': allowed is the plain name of a folder in results" ;;
esac
full="python post_training.py --pruned_model results/$name/models --output_name ${name}_full --finetune_method full"
overwrite=() previous=
for word in "$@"; do
    flag=${word%%=*} flag=${flag//-/_}
    case "$flag" in
        __pruned_model | __output_name | __output_dir | __results_dir | __lora_dir)
            refuse "${word%%=*}: is set by NAME; instead use python post_training.py, then python merge_and_save_lora.py" ;;
        __overwrite) overwrite=(--overwrite) ;;
    esac
    case "$previous:$flag:$word" in
        __finetune_method:full:* | *:__finetune_method:*=full)
            refuse "--finetune_method full: leaves no adapters to merge; use $full" ;;
    esac
    previous=$flag
done
source "$(dirname -- "$0")/setup_env.sh"

results="$repository/results"
# Call $1 with each script and its flags, in order.
both() {
    "$1" post_training.py --pruned_model "$results/$name/models" --output_name "${name}_lora" --resume "${@:2}"
    "$1" merge_and_save_lora.py --pruned_model "$results/$name/models" --lora_dir "$results/${name}_lora" \
        --output_dir "$results/${name}_merged" "${overwrite[@]}"
}

work() { run python "$repository/$1" "${@:2}"; }

both plan "$@"
check_plan
both work "$@"
