#!/usr/bin/env bash
# The classifier track from nothing to the report.
#
#   bash run_pipeline.sh [--fast] [--fresh] [--overwrite] [--models_dir DIR] [--dataset NAME|FILE|FOLDER] [--data_dir DIR]
#                        [--text_column NAME] [--text_pair_column NAME] [--label_column NAME] [--validation_fraction X]
#                        [--teacher MODEL] [--student MODEL | --student_layers 3] [--preset NAME]
#                        [--target mac|parameters|latency X] [--start student|teacher] [--embedding_rank N]
#                        [--trim_vocabulary] [--augment N] [flags of every training stage, such as --seed 1]
#
# The flags of all stages are checked before the first one works. A stage is skipped if its output exists and was made
# with the same settings from the same inputs, and a stage that was killed continues where it was. --overwrite replaces
# outputs of the same stage with other settings (quantized models and exports, which take seconds, always follow the
# models they are made from); --fresh runs all stages again, with --overwrite.
set -euo pipefail

train=() data=() models=() fast=() teacher=() student=() layers=() prune=() augment=()
skip=(--skip_existing) resume=(--resume) overwrite=()
models_dir=
while [ $# -gt 0 ]; do
    case "$1" in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --fresh) skip=() resume=() overwrite=(--overwrite) ;;
        --overwrite) overwrite=(--overwrite) ;;
        --fast) fast=(--fast) ;;
        --dataset | --data_dir | --text_column | --text_pair_column | --label_column | --validation_fraction)
            data+=("$1" "${2:?$1 needs a value}"); shift ;;
        --models_dir) models_dir="${2:?$1 needs a folder}" models=("$1" "$2"); shift ;;
        --teacher) teacher=("$1" "${2:?$1 needs a model}"); shift ;;
        --student) student=("$1" "${2:?$1 needs a model}"); shift ;;
        --student_layers) layers=("$1" "${2:?$1 needs layers}"); shift ;;
        --augment | --augment_*) augment+=("$1" "${2:?$1 needs a value}"); shift ;;
        --preset | --start | --embedding_rank) prune+=("$1" "${2:?$1 needs a value}"); shift ;;
        --target) prune+=("$1" "${2:?$1 needs what is counted}" "${3:?$1 $2 needs a share}"); shift 2 ;;
        --trim_vocabulary) prune+=("$1") ;;
        *) train+=("$1") ;;
    esac
    shift
done
source "$(dirname -- "$0")/setup_env.sh"

models_dir="${models_dir:-$repository/models}"
everywhere=("${data[@]}" "${models[@]}")
common=("${fast[@]}" "${train[@]}" "${everywhere[@]}" "${skip[@]}" "${resume[@]}")
distil=("${student[@]}" "${layers[@]}" "${augment[@]}" "${common[@]}" "${overwrite[@]}")

# Call $1 with each stage and its flags, in order.
every_stage() {
    "$1" download_model.py "${teacher[@]}" "${student[@]}" "${everywhere[@]}"
    "$1" 1_finetune_teacher.py "${teacher[@]}" "${common[@]}" "${overwrite[@]}"
    "$1" 2_distill_student.py "${distil[@]}"
    "$1" 2_distill_student.py --variant soft_labels "${distil[@]}"
    "$1" 8_pruning_with_finetuning.py "${prune[@]}" "${augment[@]}" "${common[@]}"
    "$1" 9_quantize_pruned_model.py --pruned_model_path "$models_dir/student_model" \
        --output_dir "$models_dir/student_quantized_model" "${models[@]}" "${skip[@]}" --overwrite
    "$1" 9_quantize_pruned_model.py "${models[@]}" "${skip[@]}" --overwrite
    "$1" 10_qat_kd_4bit.py "${common[@]}"
    "$1" export_model.py --precision int8 "${models[@]}" "${skip[@]}" --overwrite
    "$1" export_model.py --precision nf4 "${models[@]}" "${skip[@]}" --overwrite
    "$1" 7_evaluate_and_generate_report.py "${fast[@]}" "${everywhere[@]}"
    "$1" evaluate_plot.py "${fast[@]}" "${everywhere[@]}"
}

times=()
work() {
    local started=$SECONDS
    echo "--- $1"
    run python "$repository/$1" "${@:2}"
    local took=$((SECONDS - started))
    times+=("$(printf '%4d:%02d  %s' $((took / 60)) $((took % 60)) "$1")")
}

every_stage plan
check_plan
every_stage work
printf '%s\n' "--- minutes of each stage" "${times[@]}" "Report: $repository/results/report.html"
