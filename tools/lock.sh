#!/usr/bin/env bash
# Resolve constraints.txt for every Python from 3.10 on. Pins that still fit stay: delete a line to move it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
cp constraints.txt "$resolved"
printf '%s\n' setuptools wheel 'torch==2.13.0' |
    "${UV:-uv}" pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header \
        --extra dev --extra demo --output-file "$resolved" pyproject.toml - >/dev/null
{
    echo '# Every version that raylora is tested with, direct or not; `make lock` writes this file.'
    echo '# CUDA packages and triton are left out: the build of torch that a machine gets brings its own.'
    # Of the markers only the split by Python matters; the rest repeats [tool.uv].environments.
    grep -vE '^(nvidia-|cuda-|triton==)' "$resolved" | sed -E \
        -e "s/ ; .*python_full_version < '3\.11'.*/ ; python_version < \"3.11\"/" \
        -e "s/ ; .*python_full_version >= '3\.11'.*/ ; python_version >= \"3.11\"/" \
        -e "s/ ; python_full_version < '3\.15' .*//"
} >constraints.txt
