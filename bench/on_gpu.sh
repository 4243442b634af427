#!/usr/bin/env bash
# All that needs a GPU, in two visits to a bare machine, each under five minutes.
#
#   bash bench/on_gpu.sh [--part a|b] [--out FOLDER] [--budget SECONDS] [--commit NAME] [--wheels FOLDER] [--dry]
#   bash bench/on_gpu.sh --stages "NAME[=SECONDS] ..." ...
#
# --part a    are the shipped kernels right, how long do they run alone, their tests, the race, a profile
# --part b    the other tests, samplers in PyTorch, compute-sanitizer and ncu, the launch sweep; without --part: a, then b
# --stages    stages of bench/gpu.py instead of a part
# --out       where to write (default: $OUT, else runs/gpu); files of an earlier visit in it are replaced
# --budget    seconds per part (default: 285)
# --commit    names the commit, for a copy without .git, or inside another repository
# --wheels    a folder of pure-Python wheels of peers
# --dry       the same logic at tiny sizes on the CPU, with kernels in Triton's interpreter
#
# PYTHON in the environment names the interpreter. It needs torch, triton, numpy, pytest, hypothesis and scipy. Nothing
# is downloaded, and fastebm runs from this checkout. Results are written at once: environment.json, rows.jsonl,
# profile.txt, watched.txt, errors.log. `python bench/gpu.py rows FOLDER` makes CSV files of them.
# Exit status: 0; 1 something is wrong or failed; 64 bad arguments; 69 no CUDA device, and nothing is written;
# 70 torch or fastebm can't be imported.
set -u
root=$(cd "$(dirname "$0")/.." && pwd) || exit 70

a="shipped alone tests-a timings profile" b="tests-b samplers watched sweep"
dry=() budget=285 stages=() wheels="" out=${OUT:-runs/gpu}
usage() { sed -n '2,/^set/{/^#/!q;s/^# \{0,1\}//;p}' "$0"; }
bad() { printf '%s\n\n' "on_gpu.sh: $1" >&2; usage >&2; exit 64; }
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --dry) dry=(--dry); shift; continue ;;
    --part | --stages | --out | --budget | --commit | --wheels) [ -n "${2:-}" ] || bad "$1 needs a value" ;;
    *) bad "unknown argument: $1" ;;
  esac
  case $1 in
    --part) case $2 in a) stages=("$a") ;; b) stages=("$b") ;; *) bad "--part is a or b, got $2" ;; esac ;;
    --stages) stages=("$2") ;;
    --out) out=$2 ;;
    --budget) budget=$2 ;;
    --commit) export COMMIT=$2 ;;
    --wheels) wheels=$2 ;;
  esac
  shift 2
done
[ ${#stages[@]} -gt 0 ] || stages=("$a" "$b")

python=${PYTHON:-$(command -v python3 || command -v python)}
if [ ${#dry[@]} -eq 0 ]; then # before anything is written or replaced
  "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 69)'
  case $? in 0) ;; 69) echo "no CUDA device" >&2; exit 69 ;; *) exit 70 ;; esac
fi
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
  "$python" "$root/bench/gpu.py" visit --stages $part --out "$out" --budget "$budget" "${dry[@]}" 2>>"$out/errors.log"
  code=$?
  # a failed compilation writes out the whole kernel: only the end of that is worth bringing back
  tail -c 4000000 "$out/errors.log" >"$work/errors" && cp "$work/errors" "$out/errors.log"
  [ $code -ne 2 ] || code=64 # a stage or a budget that gpu.py refuses
  [ $code -lt 64 ] || { tail -5 "$out/errors.log" >&2; exit $code; }
  [ $code -eq 0 ] || status=1
done
exit $status
