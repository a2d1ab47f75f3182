# Sourced by demo, docs and test: makes .venv beside the project and installs the project with the extras
# named in $1, at the releases of constraints.txt; again only where it or pyproject.toml changed.
# With "latest" as $2: the newest releases, looked for each time, in .venv-latest; with "oldest", the oldest
# PyTorch that pyproject.toml allows, in .venv-oldest.
# Leaves the interpreter's path in $PYTHON.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=$1
venv=$project/.venv${2:+-$2}
PYTHON=$venv/bin/python

if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then # also where making it failed half-way
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
    echo "making $venv with $("$found" --version)"
    made=$([ -e "$venv" ] || echo "$venv")
    if ! "$found" -m venv "$venv"; then
        rm -rf ${made:+"$made"}
        echo "error: $found makes no environment; on Debian and Ubuntu, install python3-venv." >&2
        exit 1
    fi
fi

install() {
    echo "installing (PyTorch is about 3 GB with its CUDA libraries)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" --editable "$project$extras"
}

wanted="$extras $(cat "$project"/{pyproject.toml,constraints.txt,scripts/constraints.py} | cksum)"
stamp=$venv/installed$extras
if [ "${2:-}" = latest ]; then
    install --upgrade --upgrade-strategy eager
    "$PYTHON" "$project/scripts/constraints.py"
elif [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    constraints=$project/constraints.txt
    if [ "${2:-}" = oldest ]; then
        constraints=$venv/constraints.txt
        "$PYTHON" "$project/scripts/constraints.py" --oldest >"$constraints"
    fi
    install --constraint "$constraints"
    echo "$wanted" >"$stamp"
fi
