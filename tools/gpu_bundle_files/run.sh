#!/usr/bin/env bash
# Run raylora's GPU tests and its packing benchmark here, from this folder alone, in under ten minutes.
# Without a GPU the tests skip themselves and the benchmark runs one round on the processor, to try the bundle out.
#   OUT=folder    where results go (default: ./gpu-bundle-results)
#   PYTHON=python the one that has torch and transformers (default: python3)
#   WORK=folder   where packages and the model are unpacked (default: a temporary one, removed at the end)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$PWD/gpu-bundle-results}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
if [ -z "${WORK:-}" ]; then
    work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
else
    mkdir -p "$WORK" && work=$(cd "$WORK" && pwd) || exit 2
fi
unset PYTHONPATH
export PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1

"$python" "$here/prepare.py" --work "$work" --out "$out" 2>&1 | tee "$out/prepare.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 2

export PYTHONPATH="$work/src:$work/site" RAYLORA_CACHE="$work/cache"
cd "$work/src" || exit 2
# Warnings of other versions of torch than the tested one are shown, and fail nothing.
timeout 240 "$python" -m pytest -m gpu tests/gpu -W default -p no:cacheprovider \
    --junitxml="$out/pytest.xml" 2>&1 | tee "$out/pytest.txt"
tests=${PIPESTATUS[0]}

rounds=15
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || rounds=1
timeout $((580 - SECONDS)) "$python" -m benchmarks.packing --quick --rounds $rounds 2>&1 | tee "$out/packing.txt"
benchmark=${PIPESTATUS[0]}
cp -f benchmarks/results/packing_bound.json "$out/" 2>/dev/null

say() { case $1 in 0) echo "$2: ok" ;; 124) echo "$2: cut off by its time limit" ;; *) echo "$2: failed ($1)" ;; esac; }
{ say "$tests" "pytest -m gpu"; say "$benchmark" "benchmarks.packing --quick"; } | tee "$out/summary.txt"
echo "results: $out"
[ "$tests" -eq 0 ] && [ "$benchmark" -eq 0 ]
