#!/usr/bin/env bash
# Install this package into a virtual environment, which is created where there is none.
#
#   tools/venv.sh VENV [EXTRA]      EXTRA: test, dev, gpu, ... of pyproject.toml
#
# PYTHON names the interpreter; otherwise python3.12, uv's 3.12 or python3 is taken.
set -euo pipefail

venv=$1
extra=${2:-}
cd "$(dirname "$0")/.."

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        is_new_enough "$PYTHON" && echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.12 "$(uv python find 3.12 2>/dev/null || true)" python3; do
        if [[ -n $candidate ]] && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if ! is_new_enough "$venv/bin/python"; then
    if ! python=$(find_python); then
        found=$("${PYTHON:-python3}" --version 2>&1 | head -n 1 || true)
        cat >&2 <<MESSAGE
error: no Python 3.12 or newer was found; megatron-core needs it
  got: ${PYTHON:-python3} answers "$found"
  fix: install one (pyenv install 3.12, uv python install 3.12, or your system's packages),
       or name it: make PYTHON=/path/to/python3.12
MESSAGE
        exit 1
    fi
    if ! "$python" -m venv --clear "$venv"; then
        cat >&2 <<MESSAGE
error: $python could not create the virtual environment $venv
  fix: on Debian and Ubuntu install the package python3-venv, then run this again
MESSAGE
        exit 1
    fi
fi

echo "installing qwen35-mcore${extra:+ with its extra \"$extra\"} into $venv (once; torch is large)"
if ! "$venv/bin/python" -m pip install -c constraints.txt -e ".${extra:+[$extra]}" |
    awk '/^ +(Downloading|Using cached) / { print; fflush() }'; then
    echo "error: the installation into $venv failed; pip's messages are above" >&2
    exit 1
fi
