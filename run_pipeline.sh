#!/usr/bin/env bash
# The classifier track from nothing to the report.
#
#   bash run_pipeline.sh [--fast] [--fresh] [--data_dir DIR] [--models_dir DIR] [--teacher MODEL] [--student MODEL]
#                        [--preset conservative|aggressive] [flags of every training stage, such as --seed 1]
#
# A stage is skipped if its output exists and was made with the same settings from the same inputs, and a stage that
# was killed continues where it was; --fresh runs all of them again.
set -euo pipefail
cd "$(dirname "$0")"

train=() data=() models=() fast=() teacher=() student=() preset=() skip=(--skip_existing) resume=(--resume)
models_dir=models
while [ $# -gt 0 ]; do
    case "$1" in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --fresh) skip=() resume=() ;;
        --fast) fast=(--fast) ;;
        --data_dir) data=("$1" "${2:?$1 needs a folder}"); shift ;;
        --models_dir) models_dir="${2:?$1 needs a folder}" models=("$1" "$2"); shift ;;
        --teacher) teacher=("$1" "${2:?$1 needs a model}"); shift ;;
        --student) student=("$1" "${2:?$1 needs a model}"); shift ;;
        --preset) preset=("$1" "${2:?$1 needs a name}"); shift ;;
        *) train+=("$1") ;;
    esac
    shift
done
source setup_env.sh

stage() {
    echo "--- $1"
    python "$@"
}
everywhere=("${data[@]}" "${models[@]}")
common=("${fast[@]}" "${train[@]}" "${everywhere[@]}" "${skip[@]}" "${resume[@]}")
stage download_model.py "${teacher[@]}" "${student[@]}" "${everywhere[@]}"
stage 1_finetune_teacher.py "${teacher[@]}" "${common[@]}"
stage 2_distill_student.py "${student[@]}" "${common[@]}"
stage 2_distill_student.py --variant soft_labels "${student[@]}" "${common[@]}"
stage 8_pruning_with_finetuning.py "${preset[@]}" "${common[@]}"
stage 9_quantize_pruned_model.py --pruned_model_path "$models_dir/student_model" \
    --output_dir "$models_dir/student_quantized_model" "${models[@]}" "${skip[@]}"
stage 9_quantize_pruned_model.py "${models[@]}" "${skip[@]}"
stage 10_qat_kd_4bit.py "${common[@]}"
stage 7_evaluate_and_generate_report.py "${fast[@]}" "${everywhere[@]}"
stage evaluate_plot.py "${fast[@]}" "${everywhere[@]}"
