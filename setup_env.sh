# Sourced by the shell scripts beside it, from any folder: makes .venv in the repository, installs requirements.txt in
# the versions of constraints.txt when either changed, activates .venv. Sets `repository`; `run` runs a command, `plan` and `check_plan` check its flags before.

repository="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
child='' stopped='' planned=()

# Pass a signal on to the command that runs, which may have processes of its own; with none running, end here.
pass_on() {
    stopped=$1
    if [ -z "$child" ]; then exit "$((128 + $(kill -l "$1")))"; fi
    kill -s "$1" -- "-$child" 2>/dev/null || true
}
for signal in HUP INT TERM; do trap "pass_on $signal" "$signal"; done

# Run a command and wait for it; a signal to this script reaches the command and then ends this script.
# A shell acts on signals only while it does not wait in the foreground, and a command in the background ignores Ctrl-C for
# good, unless job control gives it a process group of its own. There it is out of the terminal's reach, so that of a
# Ctrl-C, too, it gets the one that is passed on.
run() {
    local status=0
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    if [ -n "$stopped" ]; then pass_on "$stopped"; fi  # it came before there was a child
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done  # a signal ends a wait early
    child=''
    if [ -n "$stopped" ]; then pass_on "$stopped"; fi
    return "$status"
}

# Note that a Python script of the repository will run with these flags.
plan() { planned+=(--then "$repository/$1" "${@:2}"); }

# Let every planned script check its flags, in one process; end here if one refuses them.
check_plan() { run python -P "$repository/compression/dry_run.py" "${planned[@]}"; }

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $PYTHON is missing or older than Python 3.11; name another one: PYTHON=python3.11 bash $0" >&2
    exit 2
fi
# "activate" is the last file that venv writes.
if [ ! -f "$repository/.venv/bin/activate" ]; then
    echo "Creating .venv with $("$PYTHON" --version)"
    run "$PYTHON" -m venv "$repository/.venv"
fi
source "$repository/.venv/bin/activate"
wanted="$(cat "$repository/requirements.txt" "$repository/constraints.txt"; python --version)"
if [ "$(cat "$repository/.venv/installed.txt" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing requirements.txt into .venv (the first time this takes minutes)"
    run python -m pip install --quiet --disable-pip-version-check -r "$repository/requirements.txt" \
        -c "$repository/constraints.txt"
    echo "$wanted" > "$repository/.venv/installed.txt"
fi

# OpenMP threads that wait by spinning bring a machine that does anything else beside this to a crawl.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
