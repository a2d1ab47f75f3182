# Sourced by demo and test: makes .venv beside the project, once per change of pyproject.toml, and
# installs the project with the extras named in $1. Leaves the interpreter's path in $PYTHON.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=$1
PYTHON=$project/.venv/bin/python

if [ ! -x "$PYTHON" ]; then
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.11 or newer on PATH; install one and run this again." >&2
        exit 1
    fi
    echo "making $project/.venv with $("$found" --version)"
    "$found" -m venv "$project/.venv"
fi

wanted="$extras $(cksum <"$project/pyproject.toml")"
stamp=$project/.venv/installed$extras
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing (PyTorch is about 3 GB with its CUDA libraries)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$project$extras"
    echo "$wanted" >"$stamp"
fi
