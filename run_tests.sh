#!/usr/bin/env bash
# Set up the environment, check style and types, run the tests. Arguments go to pytest: bash run_tests.sh -k surgery
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh

ruff check .
ruff format --check .
mypy
# Two workers with one thread each: most tests wait for small programs, and two programs with two threads each slow each
# other down.
export OMP_NUM_THREADS=1
exec python -m pytest -q -n 2 --dist loadfile "$@"
