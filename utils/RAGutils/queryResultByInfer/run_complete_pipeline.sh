#!/usr/bin/env bash
# The whole way from queries to answers: generate contexts, then answer them.
#
# This version does not generate contexts yet, so this runs the second half: it takes the settings,
# CONFIG, environment and flags of run_multi_worker_inference.sh, and answers its CONTEXTS_FILE.
set -euo pipefail

cat <<'END'
Step 1 of 2, generate contexts: left out. This version does not generate contexts;
  it answers the ones that are in CONTEXTS_FILE (see the settings below).
Step 2 of 2, answer the contexts:
END
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_multi_worker_inference.sh" "$@"
