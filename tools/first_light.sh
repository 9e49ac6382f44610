#!/usr/bin/env bash
# The first run on a GPU that is there for minutes: what is known after ten of them, whatever goes wrong.
#
#   bash tools/first_light.sh                        all parts, within TOTAL=500 seconds
#   PARTS="loop kernels" bash tools/first_light.sh   these parts
#   DGEMMA_PDL=0 PARTS=loop ...                      without programmatic dependent launches, to tell them from a kernel
#
# Parts, in order of what they tell when all after them fails (the table is in docs/kernels.md):
#
#   facts        driver, torch, compilers            kernels    bench/first_light.py: a line for each kernel
#   probe        tools/probe.cu, host_probe.py       model      the true size: a step by batch
#   conformance  a process for each case             profile    the true size: a step by part
#   families     a process for each file of tests    sanitizer  memcheck, racecheck, synccheck
#   layers       layer by layer beside the CPU       summary    what was not ok
#   loop         a process for each test
#
# Everything goes into $OUT (default build/first_light) as it is known: summary.txt, logs.tar.gz, kernels.jsonl,
# report.json, cuda.log (the driver's own words) and cores.txt (where a kernel faulted or hung).
#
# It takes the build in build/carry if it fits (tools/gpu_build.py makes it), else builds; it needs what that names, and
# pytest. PYTHON chooses the interpreter.
#
# FIRST_LIGHT_DRY=1 runs all of it without a GPU, with a stand-in for each command. FIRST_LIGHT_HANG, _FAULT, _KILL and
# _FAIL hold names of cases (loop.alone, say) that hang, fault, are killed or fail; FIRST_LIGHT_LIMIT limits each part.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${OUT:-$PWD/build/first_light}
TOTAL=${TOTAL:-500}
PARTS=${PARTS:-facts probe conformance families layers loop kernels model profile sanitizer}
DRY=${FIRST_LIGHT_DRY:-}
PY=${PYTHON:-python3}
WORK=$PWD/build/gpu
LOGS=$(mktemp -d) STATES=$(mktemp -d) CORES=$(mktemp -d)
DUMPS=""
SECONDS=0
mkdir -p "$OUT"
rm -f "$OUT"/{logs.tar.gz,kernels.jsonl,report.json,cuda.log,cores.txt}
: >"$OUT/summary.txt"

# shellcheck source=tools/time_boxed.sh
source tools/time_boxed.sh
trap 'end_all; pack; rm -rf "$LOGS" "$STATES" "$CORES"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1 DGEMMA_GPU=1 PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
export OUT LOGS CORES FIRST_LIGHT_HANG="${FIRST_LIGHT_HANG:-}" FIRST_LIGHT_FAULT="${FIRST_LIGHT_FAULT:-}"
export FIRST_LIGHT_KILL="${FIRST_LIGHT_KILL:-}" FIRST_LIGHT_FAIL="${FIRST_LIGHT_FAIL:-}"

# Stand-ins ------------------------------------------------------------------------------------------------------------

# What runs in place of a case's command on a machine without a GPU.
stand_in() {
  local name=$1
  echo "[dry] $2"
  if [[ " $FIRST_LIGHT_HANG " == *" $name "* ]]; then
    trap '' TERM INT
    while :; do sleep 0.2; done
  fi
  [[ " $FIRST_LIGHT_FAULT " == *" $name "* ]] && kill -SEGV $$
  [[ " $FIRST_LIGHT_KILL " == *" $name "* ]] && kill -KILL $$
  [[ " $FIRST_LIGHT_FAIL " == *" $name "* ]] && exit 1
  if [[ $name == kernels.* ]]; then echo '{"kernel": "stand-in"}' >>"$OUT/kernels.jsonl"; fi
  echo "stand-in for $name"
}
export -f stand_in

command_of() {
  if [[ -n $DRY ]]; then printf -v command 'stand_in %q %q' "$1" "$2"; else command=$2; fi
}

# Words -----------------------------------------------------------------------------------------------------------------

wanted() { [[ " $PARTS " == *" $1 "* ]]; }

# part NAME SECONDS AT_ONCE: runs what is queued.
part() {
  local limit=$2
  [[ -n ${FIRST_LIGHT_LIMIT:-} ]] && ((limit > FIRST_LIGHT_LIMIT)) && limit=$FIRST_LIGHT_LIMIT
  run_part "$1" "$limit" "$3"
}

# Queues nothing and says why, where a part lacks what it runs.
lacks() { say "----  $1 needs $2"; }

has_package() { [[ -n $DRY && -z $BROKEN ]] || compgen -G "$WORK/site/dgemma_ext/_C*.so" >/dev/null; }
has_program() { [[ -n $DRY && -z $BROKEN ]] || [[ -x $WORK/$1 ]]; }
show() { if [[ -s $1 ]]; then tail -n 40 "$1" | cut -c1-200 | sed 's/^/      /' | tee -a "$OUT/summary.txt"; fi; }

pytest="$PY -m pytest -p no:cacheprovider -q --tb=short"
if "$PY" -c 'import pytest_timeout' 2>/dev/null; then pytest+=" --timeout=40 --timeout-method=thread"; fi

# resumed COMMAND: pytest again, behind the test that ended it, where it died; at most three times.
resumed() {
  local worst=0 status
  for _ in 1 2 3; do
    bash -c "$1"
    status=$?
    ((status != 0 && status != 5)) && worst=$status
    grep -qs '^finished' "$DGEMMA_TESTS_BEGUN" && break
    echo "ENDED with $status in $(tail -n 1 "$DGEMMA_TESTS_BEGUN" 2>/dev/null || echo 'no test')"
  done
  return "$worst"
}
export -f resumed

# Parts ----------------------------------------------------------------------------------------------------------------

BROKEN=""
if wanted facts; then
  fields=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit
  add gpu 10 "nvidia-smi --query-gpu=$fields --format=csv,noheader"
  add torch 30 "$PY -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'"
  add machine 10 'nvcc --version | tail -n 1; gcc --version | head -n 1; nproc; free -g | sed -n 2p; git describe --always --dirty || true'
  part facts 30 3
  show "$LOGS"/facts.machine.log
fi

add build 150 "$PY tools/gpu_build.py $WORK --carried build/carry"
# Whether kernels run where they can be asked for their state; only then are they.
add dumps 30 "export_dump_settings prepare.dumps; $PY -c 'import torch; print(torch.ones(9, device=\"cuda\").sum().item())'"
part prepare 150 2
grep -q '^ok    prepare.build' "$OUT/summary.txt" || BROKEN=1
[[ -z $DRY ]] && grep -q '^ok    prepare.dumps' "$OUT/summary.txt" && DUMPS=1

if wanted probe; then
  if has_program probe; then add gpu 20 "$WORK/probe" && part probe 20 1; else lacks probe.gpu "the build"; fi
  show "$LOGS/probe.gpu.log"
  if has_package; then
    for piece in $("$PY" tools/host_probe.py --list); do
      [[ $piece == times ]] || add "$piece" 30 "$PY tools/host_probe.py $piece"
    done
    add pdl_off 30 "DGEMMA_PDL=0 $PY tools/host_probe.py pdl_in_while"
    part probe 45 16
    add times 20 "$PY tools/host_probe.py times" # by itself
    part probe 20 1
  else
    lacks probe.host "the build"
  fi
fi

if wanted conformance; then
  if has_program conformance; then
    numbers=$("$WORK/conformance" list 2>/dev/null | cut -d' ' -f1)
    for number in ${numbers:-$(seq 0 31)}; do add "$number" 15 "$WORK/conformance $number"; done
    part conformance 40 16
  else
    lacks conformance "the build"
  fi
fi

if ! has_package; then
  PARTS=" $PARTS "
  for name in families layers loop kernels model profile sanitizer; do
    wanted "$name" && lacks "$name" "the build"
    PARTS=${PARTS/ $name / }
  done
fi

if wanted families; then
  for file in $(PYTHONPATH=tools "$PY" -c 'from cuda_tools import OPERATOR_TESTS; print(*OPERATOR_TESTS)'); do
    name=${file#test_} name=${name%.py}
    add "$name" 85 "export DGEMMA_TEST_BACKEND=cuda DGEMMA_SYNC=1 DGEMMA_TESTS_BEGUN=$LOGS/$name.begun; resumed '$pytest tests/$file'"
  done
  part families 90 16
fi

if wanted layers; then
  add layers 55 "$pytest tests/test_gpu_model.py -k layers_agree"
  add twice 55 "$pytest tests/test_gpu_model.py -k twice"
  add puzzles 55 "$PY tests/solve_puzzles.py 6 10 cuda"
  part layers 60 16
fi

if wanted loop; then
  while read -r name; do
    add "$name" 70 "$pytest tests/test_gpu_loop.py::test_$name"
  done < <(sed -n 's/^def test_\([a-z_]*\)(.*/\1/p' tests/test_gpu_loop.py)
  part loop 75 16
fi

DUMPS="" # what follows is timed, or watched by another tool

if wanted kernels; then
  add all 80 "$PY bench/first_light.py --out $OUT/kernels.jsonl"
  part kernels 80 1
  show "$LOGS/kernels.all.log"
fi

report="$PY bench/full_report.py --results $OUT/report.json --plots $LOGS/plots"
if wanted model; then
  add fixed 60 "$report --minutes 0.8 --only fixed --only bfloat16 --only experts-128 --only prefix-128 --only steps-16"
  part model 60 1
  show "$LOGS/model.fixed.log"
fi
if wanted profile; then
  add step 45 "$report --minutes 0.6 --only profile --only bfloat16 --only experts-128 --only prefix-128"
  part profile 45 1
fi

if wanted sanitizer; then
  for tool in memcheck racecheck synccheck; do
    for test in grouped_gemm:kernel_is_right block_attention:test_canvas vocabulary_head:product_and_statistics \
      denoise_soft_embedding:sparse_or_dense; do
      # Each memory block by itself: torch's pool would hide what reaches past a tensor.
      add "$tool.${test%%:*}" 60 "export DGEMMA_TEST_BACKEND=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1
        compute-sanitizer --tool $tool --error-exitcode 66 --kernel-name kns=dgemma $PY -m pytest -p no:cacheprovider -q --tb=short --maxfail=1 tests/test_${test%%:*}.py -k '${test#*:}'"
    done
  done
  part sanitizer 60 16
fi

# Summary --------------------------------------------------------------------------------------------------------------

for file in "$LOGS"/*.cuda; do [[ -s $file ]] && echo "== ${file##*/}" && tail -n 40 "$file"; done >"$OUT/cuda.log"
for core in $(find "$CORES" -name '*.nvcudmp' -size +0 | head -n 4); do
  (($(left) < 6)) && break
  echo "== ${core##*/}"
  timeout 6 cuda-gdb -batch -ex "target cudacore $core" -ex "info cuda kernels" -ex "info cuda warps" -ex bt 2>/dev/null |
    head -n 60
done >"$OUT/cores.txt"
mapfile -t bad < <(grep -E '^(FAIL|TIME|DIED|LOST|----)  ' "$OUT/summary.txt")
say ""
say "== summary: $(grep -c '^ok' "$OUT/summary.txt") ok, ${#bad[@]} not, in $SECONDS s of $TOTAL"
for line in "${bad[@]}"; do
  say "$line"
  read -r _ name _ <<<"$line"
  reasons_of "$name" | sed 's/^/        /' | tee -a "$OUT/summary.txt"
done
((${#bad[@]} == 0))
