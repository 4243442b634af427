#!/usr/bin/env bash
# All that a GPU is needed for, in one call of under 9 minutes: tests, timings, launch sweeps.
#
#   bash bench/on_gpu.sh [--budget SECONDS] [--dry]
#
# Needs torch, triton, numpy and pytest; nothing is downloaded, and fastebm is run from this checkout. Writes to
# $OUT, or else bench/results/gpu/: tests.log, timings.csv, sweep.csv, environment.json, errors.log. The budget is
# divided by importance: tests to 42%, timings to 80%, sweeps with the rest; what found no time is said in rows.
# A part runs whether or not the one before it failed. Exit status, added up: 1 tests, 2 timings, 4 sweep;
# 64 for bad arguments, 69 without a CUDA device, 70 if fastebm can't be imported.
#
# --dry: the same logic at tiny sizes on the CPU, kernels in Triton's interpreter.
# PYTHON names the interpreter; COMMIT the commit, for a checkout without .git.
set -u
cd "$(dirname "$0")/.." || exit 70
root=$PWD

dry=() budget=510
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=(--dry) ;;
    --budget) budget=${2:?--budget needs seconds}; shift ;;
    *) echo "usage: bash bench/on_gpu.sh [--budget SECONDS] [--dry]" >&2; exit 64 ;;
  esac
  shift
done

start=$(date +%s)
python=${PYTHON:-$(command -v python || command -v python3)}
out=${OUT:-bench/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 70
rm -f "$out"/{tests.log,timings.csv,sweep.csv,environment.json,errors.log}
exec 3>&2 2>>"$out/errors.log"

work=$(mktemp -d)
warming=()
cleanup() {
  for pid in "${warming[@]}"; do kill "$pid" 2>/dev/null; done
  rm -rf "$work"
}
trap cleanup EXIT

say() { echo "[$(($(date +%s) - start)) s] $*"; }
give_up() { echo "$2" | tee -a "$out/errors.log" >&3; exit "$1"; }
at() { echo $((start + budget * $1 / 100)); } # Unix time at a percentage of the budget

if [ ${#dry[@]} -gt 0 ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || give_up 69 "no CUDA device (or no torch)"
fi

# -- fastebm from this checkout: as installed, else installed in place, else by links (kernels/ and bench/ are fastebm's) --
imports() {
  (cd "$work" && "$python" -c '
import sys, pathlib, fastebm, fastebm.kernels, fastebm.bench
inside = pathlib.Path(fastebm.__file__).resolve().is_relative_to(pathlib.Path(sys.argv[1]).resolve())
sys.exit(not inside)' "$root" 2>/dev/null)
}
how=installed
if ! imports; then
  how=pip
  if [ ${#dry[@]} -gt 0 ] || ! "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || ! imports; then
    how=links
    mkdir -p "$work/map/fastebm"
    ln -s "$root"/fastebm/* "$work/map/fastebm/"
    ln -s "$root/kernels" "$root/bench" "$work/map/fastebm/"
    export PYTHONPATH="$work/map${PYTHONPATH:+:$PYTHONPATH}"
    imports || give_up 70 "fastebm can't be imported from $root"
  fi
fi

cores=$(nproc)
shards=$((cores * 5 / 8)) warmers=$((cores * 3 / 8))
tests=(tests/test_{gpu,agreement,laws,invariance,noise,sampling}.py)
if [ ${#dry[@]} -gt 0 ]; then
  shards=1 warmers=1 tests=(tests/test_{gpu,langevin}.py)
fi
note=(--note "fastebm_from=$how" --note "budget_seconds=$budget")
"$python" bench/gpu.py environment --out "$out" "${note[@]}"
say "fastebm: $how; $cores cores; results go to $out"

# -- 1. tests, while the timings' kernels are compiled beside them -------------------------------------------------
for ((k = 0; k < (warmers > 0 ? warmers : 1); k++)); do
  timeout $((budget * 42 / 100)) "$python" bench/gpu.py warm --number "$k" --of "$warmers" --until "$(at 35)" \
    "${dry[@]}" &
  warming+=($!)
done
"$python" bench/gpu_tests.py --shards "$((shards > 0 ? shards : 1))" --until "$(at 42)" --log "$out/tests.log" \
  "${tests[@]}"
tests_status=$?
wait "${warming[@]}"
warming=()
say "tests: status $tests_status"

# -- 2. timings, alone on the machine ---------------------------------------------------------------------------
"$python" bench/gpu.py timings --out "$out" --until "$(at 80)" "${dry[@]}"
timings_status=$?
say "timings: status $timings_status"

# -- 3. launch sweeps, with what time is left --------------------------------------------------------------------
"$python" bench/gpu.py sweep --out "$out" --until "$(at 96)" "${dry[@]}"
sweep_status=$?
say "sweep: status $sweep_status"

took=$(($(date +%s) - start))
"$python" bench/gpu.py environment --out "$out" "${note[@]}" --note "tests_status=$tests_status" \
  --note "timings_status=$timings_status" --note "sweep_status=$sweep_status" --note "took_seconds=$took"
if [ "$(wc -c <"$out/errors.log")" -gt 3500000 ]; then
  tail -c 3500000 "$out/errors.log" >"$work/errors" && cp "$work/errors" "$out/errors.log"
fi
exit $(((tests_status != 0) + 2 * (timings_status != 0) + 4 * (sweep_status != 0)))
