#!/usr/bin/env bash
# Everything a GPU decides, in one go: build, the tests marked gpu, a memory check, errors, times, the roofline's verdict.
#
#   bench/gpu.sh [FOLDER]        # default: bench/results/<card>, ready to commit
#   PYTHON=.venv/bin/python bench/gpu.sh
#
# Needs torch with CUDA, triton, transformers and pytest; no network. Peers that are not installed are rows that say so.
# Every stage has a time limit, their sum is under eight minutes, and what a stage measured before its limit stays.
# The exit code is 1 if any stage failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
if [ -z "$card" ]; then
  echo "bench/gpu.sh: nvidia-smi finds no GPU on this machine" >&2
  exit 1
fi
out=${1:-bench/results/$(printf '%s' "$card" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')}
out=${out%-}
mkdir -p "$out/logs"

# A copy of a checkout may have lost its symbolic links.
for part in kernels rollout; do
  [ -e "gapg/$part" ] || ln -sfn "../$part" "gapg/$part"
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

verdicts=()
failed=0
# stage NAME SECONDS COMMAND...: its output in logs/NAME.log; the last lines too, if it fails.
stage() {
  local name=$1 limit=$2 start=$SECONDS code=0 verdict=ok
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$out/logs/$name.log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    failed=1
    verdict="exit code $code"
    if [ "$code" -eq 124 ]; then verdict="stopped at its limit"; fi
    tail -n 25 "$out/logs/$name.log"
  fi
  verdicts+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

stage build 40 "$python" setup.py build_ext --inplace
stage tests 110 "$python" -m pytest tests/gpu -m gpu --confcutdir tests/gpu -p no:cacheprovider --maxfail 20 -rs \
  -o timeout=40
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  stage memcheck 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 7 \
    "$python" -m pytest tests/gpu --confcutdir tests/gpu -p no:cacheprovider -k "far_below and bfloat16"
else
  verdicts+=("memcheck          not run: compute-sanitizer is not installed")
fi
stage errors 70 "$python" bench/kernels.py --only-errors --output "$out"
stage times 180 "$python" bench/kernels.py --output "$out"
if [ -e "$out/kernels-cuda.json" ]; then
  stage compare 20 "$python" bench/roofline.py --compare "$out/kernels-cuda.json"
fi

echo
for log in errors compare; do
  if [ -e "$out/logs/$log.log" ]; then tail -n 30 "$out/logs/$log.log"; fi
done
tail -n 2 "$out/logs/tests.log"
sed -n '/other\/ours/,$p' "$out/logs/times.log"
printf '%s\n' "" "$card, results in $out:" "${verdicts[@]}"
exit "$failed"
