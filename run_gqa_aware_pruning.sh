#!/usr/bin/env bash
# GQA-aware pruning of a language model, layer by layer, with the perplexities before and after.
#
#   bash run_gqa_aware_pruning.sh [flags of gqa_aware_pruning.py]
#
#   bash run_gqa_aware_pruning.sh --fast                                                      # a quick look
#   bash run_gqa_aware_pruning.sh --output_name one --layers 12 --pruning_ratio 0.25          # one layer
#   bash run_gqa_aware_pruning.sh --output_name middle --layers 10-14 --pruning_ratio 0.25    # five middle layers
#   bash run_gqa_aware_pruning.sh --output_name search --target_perplexity 25                 # as much as that allows
#   bash run_gqa_aware_pruning.sh --output_name headline --preset headline                    # the authors' recipe
#
# A run that was killed goes on where it was. Results: results/NAME (NAME: gqa, or --output_name).
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
source "$(dirname -- "$0")/setup_env.sh"

# In this shell's place, so that signals reach it.
exec python "$repository/gqa_aware_pruning.py" --resume "$@"
