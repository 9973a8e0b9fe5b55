#!/usr/bin/env bash
# bash scripts/test_matrix.sh [NOX ARGS] [-- PYTEST ARGS]: the sessions of noxfile.py, with the nox of the test extras.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && bash scripts/setup_env.sh --extras test && exec .venv/bin/nox "$@"
