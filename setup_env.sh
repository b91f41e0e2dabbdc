# Sourced by run_pipeline.sh and run_tests.sh: makes .venv, installs requirements.txt when it changed, activates it.

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $PYTHON is missing or older than Python 3.11; name another one: PYTHON=python3.11 bash $0" >&2
    exit 2
fi
# "activate" is the last file that venv writes.
if [ ! -f .venv/bin/activate ]; then
    echo "Creating .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv
fi
source .venv/bin/activate
wanted="$(cat requirements.txt; python --version)"
if [ "$(cat .venv/installed.txt 2>/dev/null)" != "$wanted" ]; then
    echo "Installing requirements.txt into .venv (the first time this takes minutes)"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" > .venv/installed.txt
fi

# OpenMP threads that wait by spinning bring a machine that does anything else beside this to a crawl.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
