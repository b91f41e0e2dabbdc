#!/usr/bin/env bash
# Recovery training of a GQA-aware pruned model by LoRA, then the merged checkpoint.
#
#   bash finetune_gqa_aware_pruned.sh [NAME] [flags of post_training.py]
#
#   bash finetune_gqa_aware_pruned.sh gqa --data_dir TEXTS
#   bash finetune_gqa_aware_pruned.sh gqa --finetune_samples 2000 --kd_weight 0.5
#
# NAME: what run_gqa_aware_pruning.sh was given as --output_name (gqa). A run that was killed goes on where it was.
# Results: results/NAME_lora (adapters), results/NAME_merged (an ordinary checkpoint); perplexities before and after
# in results/NAME_lora/stage.json.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
name=gqa
if [[ $# -gt 0 && "$1" != -* ]]; then name=$1; shift; fi
source setup_env.sh

python post_training.py --pruned_model "results/$name/models" --output_name "${name}_lora" --resume "$@"
python merge_and_save_lora.py --pruned_model "results/$name/models" --lora_dir "results/${name}_lora" \
    --output_dir "results/${name}_merged"
