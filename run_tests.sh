#!/usr/bin/env bash
# Set up the environment, check style, run the tests. Arguments go to pytest: bash run_tests.sh -k surgery
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh

ruff check .
ruff format --check .
python -m pytest -q "$@"
