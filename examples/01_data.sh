#!/usr/bin/env bash
# Step 1: tokenize the source files of Python's own standard library, byte by byte.
#
#   bash examples/01_data.sh [flags of `qwen35 data tokenize`]
set -euo pipefail
run=${QWEN35_RUN_DIR:-runs/demo}
qwen35 data tokenize stdlib --output-prefix "$run/data/stdlib" --workers 2 "$@"
