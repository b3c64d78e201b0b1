#!/usr/bin/env bash
# Makes a virtual environment and installs MegaVLM into it.
#   tools/install.sh [FOLDER]        default .venv; PYTHON chooses the interpreter
# On a machine without an NVIDIA GPU torch comes as its CPU build, never with CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
torch_version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $("$python" --version) is too old; MegaVLM needs Python 3.11 or newer. Set PYTHON." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }

echo "install: torch $torch_version into $venv"
if has_gpu; then
    pip "torch==$torch_version"
elif ! pip "torch==$torch_version+cpu" 2>/dev/null && ! pip "torch==$torch_version+cpu" --index-url "$cpu_index"; then
    echo "install: no CPU build of torch $torch_version was found (asked pip's own index and $cpu_index)." >&2
    exit 1
fi
echo "install: everything else"
pip --constraint constraints.txt --requirement requirements.txt --requirement requirements-dev.txt
pip --constraint constraints.txt --no-deps --editable .
"$venv/bin/megavlm" --version
