#!/bin/sh
# Predictions against published measurements. Usage: [BIN=.venv/bin] benchmarks/accuracy.sh DATA
# The posted measurements need no data. DATA holds amp/, llmfoundry/ and vtrain/; a set that is absent is skipped, and said to be.
set -eu
cd "$(dirname "$0")/.."
data=${1:-}
python=${BIN:+$BIN/}python
echo "Posted measurements"
"$python" benchmarks/posted.py
if [ -z "$data" ] || [ ! -d "$data" ]; then
  echo "skipped: no measurements (make accuracy DATA=folder with amp/, llmfoundry/ and vtrain/)"
  exit 0
fi
have() {
  [ -e "$data/$1" ] || { echo "skipped: $data/$1 is not there"; return 1; }
}
amp() { # trials, cluster, then options
  trials=$1 cluster=$2
  shift 2
  "$python" benchmarks/amp_trials.py --trials "$data/amp/$trials.json" \
    --cluster "examples/clusters/$cluster.toml" --profiles "$data/amp/profiles.json" "$@"
}
echo; echo "Each set without a constant fitted to it"
"$python" benchmarks/without_fit.py --data "$data" --pairs
if have amp/profiles.json; then
  t4="$data/amp/homogeneous_trials.json examples/clusters/t4-16.toml"
  v100="$data/amp/het_model_trials.json examples/clusters/v100-16.toml"
  echo; echo "AMP, shipped constants, those of the set itself, those of the other set"
  # The pairs are two words each on purpose.
  # shellcheck disable=SC2086
  for fit in "" "--fit $t4" "--fit $v100"; do
    amp homogeneous_trials t4-16 $fit
    amp het_model_trials v100-16 $fit
  done
fi
if have llmfoundry/h100_80gb.csv && have llmfoundry/a100_80gb.csv; then
  echo; echo "FSDP runs of llm-foundry"
  "$python" benchmarks/fsdp_runs.py --refit --runs "$data/llmfoundry/h100_80gb.csv" \
    --runs "$data/llmfoundry/a100_80gb.csv"
fi
if have vtrain/single_node.csv; then
  echo; echo "vTrain's single-node runs"
  "$python" benchmarks/vtrain_runs.py --refit --runs "$data/vtrain/single_node.csv"
fi
