#!/usr/bin/env bash
# The classifier track from nothing to the report.
#
#   bash run_pipeline.sh [--fast] [--fresh] [--data_dir DIR] [--seed N] ...
#
# --fresh runs every stage again; without it a stage is skipped if its output exists and was made with the same
# configuration from the same inputs, and a stage that was killed continues where it was. Other flags go to every
# training stage; --fast and --data_dir also to the report.
set -euo pipefail
cd "$(dirname "$0")"

stage_flags=() report_flags=() data_flags=() mode=(--skip_existing --resume)
while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) mode=() ;;
        --fast) stage_flags+=("$1"); report_flags+=("$1") ;;
        --data_dir) data_flags=("$1" "${2:?--data_dir needs a folder}"); shift ;;
        *) stage_flags+=("$1") ;;
    esac
    shift
done
source setup_env.sh

python download_model.py "${data_flags[@]}"
stage_flags+=("${data_flags[@]}" "${mode[@]}")
for stage in "1_finetune_teacher.py" "2_distill_student.py" "2_distill_student.py --variant soft_labels" \
    "8_pruning_with_finetuning.py"; do
    echo "--- $stage"
    # shellcheck disable=SC2086  # the stage's own flag is a word of its own
    python $stage "${stage_flags[@]}"
done
echo "--- 7_evaluate_and_generate_report.py"
python 7_evaluate_and_generate_report.py "${report_flags[@]}" "${data_flags[@]}"
