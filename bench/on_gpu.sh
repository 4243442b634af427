#!/usr/bin/env bash
# All that a GPU is needed for, in two visits to a bare machine, of under five minutes each.
#
#   bash bench/on_gpu.sh --part a|b [--budget SECONDS] [--commit NAME] [--wheels FOLDER] [--dry]
#   bash bench/on_gpu.sh --stages "NAME[=SECONDS] ..." ...      stages of bench/gpu.py; without either: a, then b
#
# Part a: are the shipped kernels right, how long do they run alone, their tests, the race, a profile.
# Part b: the other tests, compute-sanitizer and ncu, the launch sweep.
#
# Needs torch, triton, numpy, pytest, hypothesis and scipy; nothing is downloaded, and fastebm is run from this
# checkout. Results go to $OUT, or else bench/results/gpu/, each at the moment it is known: environment.json,
# rows.jsonl, profile.txt, watched.txt, errors.log. `python bench/gpu.py rows FOLDER` makes result files of them.
# Exit status: 0; 1 something is wrong or failed; 64 bad arguments, 69 no CUDA device, 70 fastebm can't be imported.
#
# --dry: the same logic at tiny sizes on the CPU, kernels in Triton's interpreter.
# --commit names the commit, for a copy without .git, or with another's. --wheels: a folder of pure-Python wheels of peers.
# PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 70
root=$PWD

a="shipped alone tests-a timings profile" b="tests-b watched sweep"
dry=() budget=285 stages=() wheels=""
usage() { sed -n '2,/^set/{/^#/!q;s/^# \{0,1\}//;p}' "$0" >&2; exit 64; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=(--dry); shift; continue ;;
    --part) case ${2:-} in a) stages=("$a") ;; b) stages=("$b") ;; *) usage ;; esac ;;
    --stages) stages=("${2:?--stages needs names}") ;;
    --budget) budget=${2:?--budget needs seconds} ;;
    --commit) export COMMIT=${2:?--commit needs a name} ;;
    --wheels) wheels=${2:?--wheels needs a folder} ;;
    *) usage ;;
  esac
  shift 2
done
[ ${#stages[@]} -gt 0 ] || stages=("$a" "$b")

python=${PYTHON:-$(command -v python3 || command -v python)}
out=${OUT:-bench/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 70
rm -f "$out"/{environment.json,rows.jsonl,profile.txt,watched.txt,errors.log}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fastebm by links, since kernels/ and bench/ are fastebm's too: quicker than installing it, and nothing is written
mkdir -p "$work/map/fastebm"
ln -s "$root"/fastebm/* "$root/kernels" "$root/bench" "$work/map/fastebm/"
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*-none-any.whl; do "$python" -m zipfile -e "$wheel" "$work/map"; done
fi
export PYTHONPATH="$work/map${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_COMPILE_THREADS=1 PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="$work/jax" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 XLA_PYTHON_CLIENT_PREALLOCATE=false
[ ${#dry[@]} -eq 0 ] || export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""

status=0
for part in "${stages[@]}"; do
  # shellcheck disable=SC2086 # stages are words
  "$python" bench/gpu.py visit --stages $part --out "$out" --budget "$budget" "${dry[@]}" 2>>"$out/errors.log"
  code=$?
  # a failed compilation writes out the whole kernel: only the end of that is worth bringing back
  tail -c 4000000 "$out/errors.log" >"$work/errors" && cp "$work/errors" "$out/errors.log"
  [ $code -lt 64 ] || { tail -5 "$out/errors.log" >&2; exit $code; }
  [ $code -eq 0 ] || status=1
done
exit $status
