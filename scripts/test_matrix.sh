#!/usr/bin/env bash
# bash scripts/test_matrix.sh [NOX ARGS] [-- PYTEST ARGS]: the sessions of noxfile.py, with the nox of the test extras.
#   MEGATRON_LM=/path/to/checkout bash scripts/test_matrix.sh -s main -- tests/integration/test_equality.py
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && bash scripts/setup_env.sh --extras test && exec .venv/bin/nox "$@"
