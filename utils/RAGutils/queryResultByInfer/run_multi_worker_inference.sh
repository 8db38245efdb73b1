#!/usr/bin/env bash
# shellcheck disable=SC2034  # the settings are read by their names
#
# Answer a file of contexts with several workers: the settings below, then one Python process.
#
#   bash run_multi_worker_inference.sh                            the settings below as they are
#   CONFIG=my.env bash run_multi_worker_inference.sh              a file of KEY=VALUE lines
#   NUM_WORKERS=4 bash run_multi_worker_inference.sh              the environment
#   bash run_multi_worker_inference.sh --num_workers 4 --seed 7   any flag of `ragfleet infer`
#
# What comes later wins: this file < CONFIG < environment < flags. The script prints every setting
# and where it came from. DRY_RUN=1 prints the command and stops.
#
# A relative path in this file starts at the project's root; a path you give (CONFIG, environment,
# flags) starts where you are, as with any command. The same command again resumes what it began.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi # started as `sh ...`
set -euo pipefail
if ((BASH_VERSINFO[0] < 4)); then
  echo "bash 4 or newer is needed; this is ${BASH_VERSION}" >&2
  exit 2
fi
declare -A environment=() # what the caller exported, before the settings below replace it
for name in $(compgen -e); do environment[$name]=${!name}; done

# ---- Settings -------------------------------------------------------------------------------------
# On a GPU node:             NUM_WORKERS  TOTAL_GPUS  GPUS_PER_WORKER
#   four workers, two each        4           8             2
#   two workers, four each        2           8             4      a larger model
#   eight workers, one each       8           8             1      a small model
#   half the node                 2           4             2      leaves four GPUs to others
# Empty: TOTAL_GPUS is all that are free, GPUS_PER_WORKER is TOTAL_GPUS divided by NUM_WORKERS.
NUM_WORKERS=2
TOTAL_GPUS=
GPUS_PER_WORKER=
GPU_PICK=free           # free: idle GPUs, then those with room beside others; all: every visible GPU
DEVICE=auto             # auto: GPUs if there are any; cpu: never touch a GPU
MAX_SAMPLES_PER_WORKER= # answer only the first so many of each worker's share; empty: all

CONTEXTS_FILE=examples/contexts.jsonl
OUTPUT_FILE=results/results.jsonl
MODEL_PATH=pocket       # the demo model in the package; a folder, or a Hub id, for real answers
INFERENCE_TYPE=local    # local: a folder; huggingface: a Hub id; togetherai, openai: an API's model
ENGINE=auto
PRECISION=auto          # auto, fp32, fp16, bf16
BATCH_SIZE=             # empty: 64 on CPU, 512 on a GPU; 8 and 32 without shared prefixes
MAX_MODEL_LEN=          # empty: the model's own limit

MAX_NEW_TOKENS=64       # 512 for real answers
TEMPERATURE=0.2         # 0: greedy
TOP_P=0.95
SEED=                   # empty: other draws in each new run

PYTHON=                 # empty: an active environment that has ragfleet, else .venv, else python3
# ---- End of the settings --------------------------------------------------------------------------

settings=(NUM_WORKERS TOTAL_GPUS GPUS_PER_WORKER GPU_PICK DEVICE MAX_SAMPLES_PER_WORKER
  CONTEXTS_FILE OUTPUT_FILE MODEL_PATH INFERENCE_TYPE ENGINE PRECISION BATCH_SIZE MAX_MODEL_LEN
  MAX_NEW_TOKENS TEMPERATURE TOP_P SEED PYTHON)
paths=(CONTEXTS_FILE OUTPUT_FILE MODEL_PATH)
switches=() # settings that are true or false
program=multi_worker_inference.py
# run_complete_pipeline.sh sources this file and brings more settings.
if declare -F pipeline_settings >/dev/null; then pipeline_settings; fi

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../.." && pwd) # also of a link to it
if [[ $PWD -ef $root ]]; then prefix=; else prefix=$root/; fi

declare -A origin=()
for name in "${settings[@]}"; do origin[$name]=script; done

is_setting() {
  [[ $1 =~ ^[A-Z_]+$ && -n ${origin[$1]+set} ]]
}

# The edit distance of two words, row by row.
distance() {
  local a=$1 b=$2 i j cost best
  local -a previous current
  for ((j = 0; j <= ${#b}; j++)); do previous[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    current=("$i")
    for ((j = 1; j <= ${#b}; j++)); do
      cost=1
      if [[ ${a:i-1:1} == "${b:j-1:1}" ]]; then cost=0; fi
      best=$((previous[j - 1] + cost))
      if ((previous[j] + 1 < best)); then best=$((previous[j] + 1)); fi
      if ((current[j - 1] + 1 < best)); then best=$((current[j - 1] + 1)); fi
      current[j]=$best
    done
    previous=("${current[@]}")
  done
  echo "${previous[${#b}]}"
}

nearest_setting() {
  local name nearest='' least=1000 steps
  for name in "${settings[@]}"; do
    steps=$(distance "${1^^}" "$name")
    if ((steps < least)); then
      least=$steps
      nearest=$name
    fi
  done
  echo "$nearest"
}

# KEY=VALUE lines, quotes and comments as in a shell, but nothing is executed or expanded: a file of
# settings that runs commands would be a program that nobody reviews.
read_config() {
  local file=$1 line key value number=0
  local assignment='^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$'
  local single="^'([^']*)'[[:space:]]*(#.*)?\$"
  local double='^"([^"]*)"[[:space:]]*(#.*)?$'
  local plain='^([^[:space:]"'\'']*)[[:space:]]*([[:space:]]#.*)?$'
  [[ -f $file && -r $file ]] || die "CONFIG=$file: no such file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if ((number == 1)); then line=${line#$'\xEF\xBB\xBF'}; fi # a byte order mark
    if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
    [[ $line =~ $assignment ]] || die "$file:$number: not a KEY=VALUE line: $line"
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    is_setting "$key" ||
      die "$file:$number: there is no setting $key; the nearest is $(nearest_setting "$key")." \
        "Other flags of ragfleet go on the command line."
    if [[ $value =~ $single ]]; then
      value=${BASH_REMATCH[1]}
    elif [[ $value =~ $double || $value =~ $plain ]]; then
      value=${BASH_REMATCH[1]}
      [[ $value != *[\$\`\\]* && $value != '~'* ]] ||
        die "$file:$number: \$, \`, \\ and ~ are not expanded in this file; write the value out," \
          "or put it in single quotes to mean it literally"
    else
      die "$file:$number: put the value in quotes: $line"
    fi
    printf -v "$key" %s "$value"
    origin[$key]=$file
  done <"$file"
}

if [[ -n ${CONFIG:-} ]]; then read_config "$CONFIG"; fi

for name in "${settings[@]}"; do
  if [[ -n ${environment[$name]+set} ]]; then
    printf -v "$name" %s "${environment[$name]}"
    origin[$name]=environment
  fi
done

# Flags go on as they are; the ones that are settings are noted, so that each is given only once.
toml=
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
  flag=${arguments[i]}
  if [[ $flag != --?* ]]; then continue; fi
  if [[ $flag == *=* ]]; then value=${flag#*=}; else value=${arguments[i + 1]-}; fi
  name=${flag%%=*}
  name=${name#--}
  name=${name//-/_}
  if [[ $name == config ]]; then toml=$value; fi
  name=${name^^}
  if [[ $name != PYTHON ]] && is_setting "$name"; then
    printf -v "$name" %s "$value"
    origin[$name]=flag
  fi
done

# Paths of this file start at the project's root.
for name in "${paths[@]}"; do
  if [[ $name == MODEL_PATH && ($INFERENCE_TYPE != local || $MODEL_PATH == pocket) ]]; then
    continue
  fi
  if [[ ${origin[$name]} == script && -n ${!name} && ${!name} != /* ]]; then
    printf -v "$name" %s "$prefix${!name}"
  fi
done

has_ragfleet() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("ragfleet") is None)' 2>/dev/null
}

# An active environment counts if ragfleet was installed into it: conda's base is always active.
if [[ -z $PYTHON ]]; then
  if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] && has_ragfleet python; then
    PYTHON=python
  elif [[ -x $root/.venv/bin/python ]]; then
    PYTHON=${prefix}.venv/bin/python
  else
    PYTHON=$(command -v python3 || command -v python) || die "no python3 found; set PYTHON"
  fi
fi

command=("$PYTHON" "${prefix}utils/RAGutils/queryResultByInfer/$program")
width=1
for name in "${settings[@]}"; do
  if [[ $name == PYTHON ]]; then
    :
  elif [[ ${origin[$name]} == script && -n $toml ]]; then
    printf -v "$name" %s '' # a default of this file does not outweigh the TOML file
    origin[$name]="left to $toml"
  elif [[ ${origin[$name]} != flag && " ${switches[*]} " == *" $name "* ]]; then
    case ${!name} in
      true | 1 | yes) command+=("--${name,,}") ;;
      false | 0 | no) command+=("--no_${name,,}") ;;
      '') ;;
      *) die "$name=${!name}: it is true or false" ;;
    esac
  elif [[ ${origin[$name]} != flag && -n ${!name} ]]; then
    command+=("--${name,,}" "${!name}")
  fi
  value=${!name}
  if ((${#value} > width)); then width=${#value}; fi
done
command+=("$@")

echo "Settings of ${0##*/}"
for name in "${settings[@]}"; do
  printf '  %-22s  %-*s  %s\n' "$name" "$width" "${!name:--}" "${origin[$name]}"
done

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if [[ ${origin[MODEL_PATH]} == script && $ENGINE != echo ]]; then
  [[ $INFERENCE_TYPE == local ]] ||
    die "INFERENCE_TYPE=$INFERENCE_TYPE needs a MODEL_PATH: the id of a Hub model"
  [[ $MODEL_PATH == pocket || -d $MODEL_PATH ]] ||
    die "there is no model at $MODEL_PATH: set MODEL_PATH (pocket is the demo model)"
fi
command -v -- "$PYTHON" > /dev/null || die "there is no PYTHON=$PYTHON"
exec "${command[@]}"
