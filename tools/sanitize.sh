#!/usr/bin/env bash
# Runs every kernel under compute-sanitizer: out-of-bounds and uninitialised memory, races, barriers.
#
#   tools/sanitize.sh [memcheck|initcheck|racecheck|synccheck ...]
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed (it comes with the CUDA toolkit)" >&2
    exit 2
fi

# the caching allocator would hide an access behind the end of a tensor
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tools=("$@")
if [ ${#tools[@]} -eq 0 ]; then
    tools=(memcheck initcheck racecheck synccheck)
fi
status=0
for tool in "${tools[@]}"; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --kernel-name regex:_kernel --error-exitcode 1 \
        "${PYTHON:-python3}" -m tools.exercise || status=1
done
exit $status
