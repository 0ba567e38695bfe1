#!/usr/bin/env bash
# What a GPU decides, in three stages of at most 7 minutes each, each a command of its own; see bench/GPU.md.
#
#   bench/gpu.sh A              # is it right, which tile wins, the head beside bare cuBLAS
#   bench/gpu.sh B              # a whole update at 1.5B, saving by saving, beside TRL and Liger; the shared prompt
#   bench/gpu.sh C              # the head beside its peers at three shapes; ncu on the GEMM
#   bench/gpu.sh A --dry-run    # without a GPU: the same files from small shapes, and no measurement
#
# OUT: the folder of the results, by default bench/results/<card>, and runs/bench/dry-run for a dry run. PYTHON: a Python
# that has what GPU.md lists. WHEELS: what `make gpu-wheels` fetched, by default .wheels. SITE: where it is installed, a
# folder called site-packages. DRY_SHAPE, DRY_UPDATE: T,H,V of the head and P,R,G of the update in a dry run.
#
# A stage leaves at most 8 files, its logs in one tar. A step that fails or meets its time limit stops no other; the exit
# code is 1 if any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
stage=${1:-} dry=${2:-}
if [[ ! $stage =~ ^[ABC]$ || ($# -gt 1 && $dry != --dry-run) || $# -gt 2 ]]; then
  echo "usage: bench/gpu.sh A|B|C [--dry-run]" >&2
  exit 2
fi
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
if [ -n "$dry" ]; then
  card=dry-run
elif [ -z "$card" ]; then
  echo "bench/gpu.sh: nvidia-smi finds no GPU on this machine (--dry-run needs none)" >&2
  exit 1
fi
if [ -z "$dry" ] && ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "bench/gpu.sh: the torch of $python does not see the $card (PYTHON names another)" >&2
  exit 1
fi
slug=$(printf '%s' "$card" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')
if [ -n "$dry" ]; then out=${OUT:-runs/bench/dry-run}; else out=${OUT:-bench/results/${slug%-}}; fi
site=${SITE:-${TMPDIR:-/tmp}/gapg-gpu/site-packages}
wheels=${WHEELS:-.wheels}
logs=$(mktemp -d)
mkdir -p "$out"
touch "$logs/begin"

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD:$PWD/csrc:$PWD/kernels:$PWD/rollout:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"

shape=16384,2048,151936 errors=2048,2048,151936 tiles=$shape workers=8
peers=(--shape "$shape" --shape 32768,1536,151936 --shape 16384,3072,128256)
update=(--case 1.5B-P1024-30 --prompts 16 --seconds 100)
shared=(--seconds 30)
if [ -n "$dry" ]; then
  shape=${DRY_SHAPE:-256,256,8192} errors=$shape tiles=144,80,2401 workers=0
  peers=(--shape "$shape")
  update=(--shape "${DRY_UPDATE:-64,64,8}" --rounds 1)
  shared=(--rounds 1)
fi

verdicts="$out/steps-$stage.tsv"
printf 'step\tseconds\tlimit\tverdict\n' >"$verdicts"
failed=0 child='' current=''
# step NAME SECONDS COMMAND...: its output in the logs; the last lines too, if it fails. Leaves its exit code in `code`.
step() {
  local name=$1 limit=$2 start=$SECONDS verdict=ok
  if [ -n "$dry" ]; then limit=$((10 * limit)); fi # a busy CPU is slow, not wrong
  code=0
  current="$name\t0\t$limit"
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 &
  child=$!
  wait "$child" || code=$?
  child=''
  if [ "$code" -ne 0 ]; then
    failed=1
    verdict="exit code $code"
    if [ "$code" -eq 124 ]; then verdict="stopped at its limit"; fi
    tail -n 25 "$logs/$name.log"
  fi
  printf '%s\t%d\t%d\t%s\n' "$name" $((SECONDS - start)) "$limit" "$verdict" >>"$verdicts"
}
# Stopped from outside: the step's command hears of it and saves what it has, and so does this.
stopped() {
  failed=1
  if [ -n "$child" ]; then
    kill "$child" && wait "$child"
    printf '%b\tstopped from outside\n' "$current" >>"$verdicts"
  fi
  exit
}
# skip NAME REASON
skip() { printf '%s\t0\t0\tnot run: %s\n' "$1" "$2" >>"$verdicts"; }
# show NAME [PATTERN]: the end of a step's output, from the last line that matches.
show() {
  if [ -e "$logs/$1.log" ]; then tail -n 40 "$logs/$1.log" | sed -n "/${2:-^}/,\$p"; fi
}

build() { step build 40 "$python" setup.py build_ext --inplace; }
# install SET SECONDS: the wheels of a set, where any came along. (What lay in SITE before may be another Python's.)
install() {
  if [ -e "$wheels/manifest.json" ]; then
    step wheels "$2" "$python" bench/gpu_wheels.py install "$1" "$site" --wheels "$wheels"
    if [ "$code" -eq 0 ]; then export PYTHONPATH="$PYTHONPATH:$site"; fi
  else
    skip wheels "there is no $wheels/manifest.json (make gpu-wheels)"
  fi
}

stage_A() {
  build
  # pytest's own limit comes first: it then still prints what failed.
  step tests 110 env OMP_NUM_THREADS=2 "$python" -m pytest tests/gpu -m gpu --confcutdir tests/gpu \
    -p no:cacheprovider -n "$workers" --maxfail 20 -rs -o timeout=60 -o session_timeout=95
  step errors 50 "$python" bench/heads.py --only-errors --shape "$errors" --impl "gapg,PyTorch eager" \
    --output "$out/kernels"
  step tiles 45 "$python" bench/tiles.py --shape "$tiles" --output "$out/tiles"
  step head 100 "$python" bench/heads.py --shape "$shape" --case train,peaked,zero,frozen,forward \
    --impl "gapg,PyTorch eager" --output "$out/kernels"
  if [ -n "$dry" ]; then
    skip roofline "a dry run is no card"
    skip memcheck "a dry run is no card"
    return
  fi
  local record measured=()
  for record in "$out/kernels/kernels-cuda.json" "$out/tiles/tiles-cuda.json"; do
    if [ -e "$record" ]; then measured+=("$record"); fi
  done
  if [ ${#measured[@]} -gt 0 ]; then
    step roofline 20 "$python" bench/roofline.py --compare "${measured[@]}"
  else
    skip roofline "nothing was measured"
  fi
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$sanitizer" ]; then
    step memcheck 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 7 \
      --report-api-errors no \
      "$python" -m pytest tests/gpu --confcutdir tests/gpu -p no:cacheprovider -k "far_below and bfloat16 or every_run_and_every_batch"
  else
    skip memcheck "compute-sanitizer is not installed"
  fi
}

stage_B() {
  install update 25
  build
  step update 260 "$python" bench/update_step.py --only timed "${update[@]}" --output "$out/update_step"
  step shared 50 "$python" bench/shared_prompt.py "${shared[@]}" --output "$out/shared_prompt"
}

stage_C() {
  install peers 40
  # Two processes: an illegal access or a hang of one ends all that come after it in the same.
  step peers 115 "$python" bench/heads.py "${peers[@]}" --case train,forward \
    --impl "gapg fused_policy_loss,main_grad,linear_logprob,cce,verl,TRL" --output "$out/peers"
  step cutlass 115 "$python" bench/heads.py "${peers[@]}" --case train,forward \
    --impl "gapg fused_policy_loss,main_grad,linear_logprob,Liger scaled,Liger cross entropy (CuTe),quack" --output "$out/cutlass"
  step attention 60 "$python" bench/attention.py --seconds 3 --output "$out/attention"
  local profiler
  profiler=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null)
  if [ -n "$dry" ]; then
    skip ncu "a dry run is no card"
  elif [ -n "$profiler" ]; then
    # The sweep marks what it times: of the forward alone the untimed launches are skipped, the timed ones taken.
    step ncu 80 "$profiler" --clock-control none --profile-from-start off --launch-skip 4 --launch-count 8 \
      --kernel-name 'regex:odds_gemm|gemm|nvjet' \
      --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section Occupancy \
      --section WarpStateStats --log-file "$out/ncu.txt" \
      "$python" bench/tiles.py --shape "$shape" --rounds 1 --output "$logs/tiles"
  else
    skip ncu "Nsight Compute is not installed"
  fi
}

# What a transfer brings back: at most 8 files a stage, 16 MiB each, no more than 2 folders down, plain names.
check_files() {
  local path size count=0
  while read -r size path; do
    count=$((count + 1))
    if [ "$size" -gt $((16 << 20)) ]; then failed=1 && echo "$path is over 16 MiB"; fi
    if [[ ! $path =~ ^([A-Za-z0-9._-]+/){0,2}[A-Za-z0-9._-]+$ ]]; then failed=1 && echo "$path has an odd name or depth"; fi
  done < <(find "$out" -type f -newer "$logs/begin" -printf '%s %P\n')
  if [ "$count" -gt 8 ]; then failed=1 && echo "$count files: at most 8 come back"; fi
}

finish() {
  trap - EXIT
  rm -rf "$logs/tiles"
  tar -C "$logs" -czf "$out/logs-$stage.tar.gz" --exclude=begin .
  check_files
  echo
  for log in errors tiles roofline shared; do show "$log"; done
  show tests "passed\|failed\|skipped\|error"
  show head "floor ms"
  show peers "floor ms"
  show cutlass "floor ms"
  show update
  printf '\n%s, stage %s, results in %s:\n' "$card" "$stage" "$out"
  column -t -s $'\t' "$verdicts" 2>/dev/null || cat "$verdicts"
  rm -rf "$logs"
  exit "$failed"
}
trap stopped INT TERM
trap finish EXIT
"stage_$stage"
