#!/usr/bin/env bash
# On the other machine: OUT=results bash PACK/run.sh [arguments of tests.gpu.stages]
# Installs the pack beside what is there, without network, once; then runs the stages. Every stage leaves $OUT/STAGE.json.
set -euo pipefail
pack=$(cd "$(dirname "$0")" && pwd)
home=${GPU_HOME:-${TMPDIR:-/tmp}/nvfp4-gpu}
mkdir -p "${OUT:?names the folder for results}"
OUT=$(cd "$OUT" && pwd)
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [ ! -e "$home/installed" ]; then
    rm -rf "$home"
    mkdir -p "$home/project"
    tar -xf "$pack/project.tar" -C "$home/project"
    "${PYTHON:-python3}" -m venv --system-site-packages "$home/venv"
    # If that python is itself a virtual environment's, its packages are not the system's: a .pth file names them.
    paths='import sysconfig; print(*dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib")), sep="\n")'
    "${PYTHON:-python3}" -c "$paths" > "$("$home/venv/bin/python" -c "$paths" | head -1)/there.pth"
    pip=("$home/venv/bin/python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check)
    "${pip[@]}" "$pack"/wheels/*.whl
    # The C kernels are built here; without a compiler torch gives the same bytes, slowly.
    "${pip[@]}" --no-build-isolation --editable "$home/project"
    touch "$home/installed"
fi
cd "$home/project"
exec "$home/venv/bin/python" -m tests.gpu.stages "$OUT" --work "$home/work" "$@"
