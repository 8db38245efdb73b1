#!/usr/bin/env bash
# shellcheck disable=SC2034  # the settings are read by their names, in the file sourced below
#
# The whole way from queries to answers: corpora (made where missing) -> contexts -> answers.
#
#   bash run_complete_pipeline.sh                               the settings below as they are
#   CONFIG=my.env bash run_complete_pipeline.sh                 a file of KEY=VALUE lines
#   QUERIES_FILE=mine.jsonl bash run_complete_pipeline.sh       the environment
#   bash run_complete_pipeline.sh --max_documents 5             any flag of `ragfleet pipeline`
#
# The settings for answering (model, workers, GPUs, sampling) are those at the top of
# run_multi_worker_inference.sh, which does the rest; what comes later wins there as here. The same
# command again resumes every stage, and after a change runs again only what the change touched.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi # started as `sh ...`
set -euo pipefail

pipeline_settings() {
  # ---- Settings of the first two stages -----------------------------------------------------------
  QUERIES_FILE=examples/queries.jsonl # JSON or JSONL: query, target_api, target_dependency
  CORPUS_PATH=examples/corpus         # <package>/<version>.jsonl; what is missing is built into it
  BUILD_CORPORA=never                 # missing: ask the package index for them; never: stay offline
  CORPUS_TYPE=docstring               # docstring or srccodes
  EMBEDDING_SOURCE=                   # empty: search by words; local or togetherai: by meaning too
  MAX_DOCUMENTS=10                    # most documents in a context
  MAX_TOKENS=                         # most tokens in a context; empty: what the model takes, up to 4000
  ENABLE_STR_MATCH=true               # accept a name that ends like one documented path
  CONTEXTS_FILE=results/pipeline.contexts.jsonl
  OUTPUT_FILE=results/pipeline.jsonl
  # ---- End of these settings ----------------------------------------------------------------------
  settings=(QUERIES_FILE CORPUS_PATH BUILD_CORPORA CORPUS_TYPE EMBEDDING_SOURCE MAX_DOCUMENTS
    MAX_TOKENS ENABLE_STR_MATCH "${settings[@]}")
  paths+=(QUERIES_FILE CORPUS_PATH)
  switches=(ENABLE_STR_MATCH)
  program=complete_pipeline.py
}

# shellcheck source=utils/RAGutils/queryResultByInfer/run_multi_worker_inference.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/run_multi_worker_inference.sh"
