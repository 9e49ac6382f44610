# shellcheck shell=bash
# Runs the parts of a run whose time is short; tools/first_light.sh reads this file.
#
#   add CASE SECONDS COMMAND        queues a case of the next part, with a limit of its own
#   run_part PART SECONDS AT_ONCE   runs what is queued, each case in a process group of its own
#
# A part gets its limit or what is left of TOTAL, whichever is less. A case that hangs, faults or is killed costs itself
# alone, and so does a part. A case is reported when it ends, in a line of $OUT/summary.txt:
#
#   ok    it ended with 0                       FAIL  with another status
#   TIME  it was ended at its limit             DIED  a signal ended it (a fault, or no memory)
#   LOST  it does not end, even killed          ----  it was not run
#
# Before a case is ended at its limit, what its kernels are doing is written to $CORES, where $DUMPS is set.
# The caller sets OUT, LOGS, STATES, CORES, TOTAL and DUMPS, and defines command_of CASE COMMAND, which sets `command`.

GRACE=${GRACE:-8}      # seconds from the signal to end to the one to kill
RESERVE=${RESERVE:-12} # seconds that are kept for the last part
DUMP_BEFORE=6          # seconds before the limit at which a hanging kernel is asked where it is

CASES=() LIMITS=() COMMANDS=()

say() { printf '%s\n' "$*" | tee -a "$OUT/summary.txt"; }

left() { echo $((TOTAL - SECONDS)); }

# The archive is replaced whole: a run that is killed meanwhile still has the one before.
pack() { tar -C "$LOGS" -czf "$OUT/logs.partial" . 2>/dev/null && mv "$OUT/logs.partial" "$OUT/logs.tar.gz"; }

add() {
  CASES+=("$1")
  LIMITS+=("$2")
  COMMANDS+=("$3")
}

# A kernel's state is written when it faults, and when a byte comes through its process's pipe; memory is left out, and
# the process goes on, to say what it was doing.
export_dump_settings() {
  export CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1
  CUDA_COREDUMP_GENERATION_FLAGS=skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory
  export CUDA_COREDUMP_GENERATION_FLAGS+=,skip_local_memory,skip_constbank_memory,skip_abort
  export CUDA_COREDUMP_FILE="$CORES/$1.%p.nvcudmp"
  export CUDA_ENABLE_USER_TRIGGERED_COREDUMP=1 CUDA_COREDUMP_PIPE="$CORES/$1.pipe.%p"
}
export -f export_dump_settings

# begin CASE SECONDS COMMAND: leaves the case's status in a file when it has ended.
begin() {
  local name=$1 limit=$2 command
  command_of "$name" "$3"
  (
    export CUDA_LOG_FILE="$LOGS/$name.cuda" # the driver's reasons for what it refuses
    [[ -n $DUMPS ]] && export_dump_settings "$name"
    # As by Ctrl-C, so that pytest still says what failed.
    timeout -s INT -k "$GRACE" "$limit" bash -c "$command" >"$LOGS/$name.log" 2>&1 </dev/null &
    echo $! >"$STATES/$name.pid"
    wait $!
    echo $? >"$STATES/$name.partial"
    mv "$STATES/$name.partial" "$STATES/$name.status"
  ) 2>/dev/null &
}

# The last words of a case: of pytest the counts, of anything else its last line.
words_of() {
  tail -c 4000 "$LOGS/$1.log" 2>/dev/null | grep -av '^[[:space:]]*$' | tail -n 1 | cut -c1-160
}

# What was wrong, where a log says more than its last words: pytest's lines of errors, or the last lines.
reasons_of() {
  [[ -e $LOGS/$1.log ]] && (($(wc -l <"$LOGS/$1.log") > 1)) || return
  grep -aE '^(E  |ENDED|FAILED|ERROR|Fatal|dgemma::|========= [A-Z])' "$LOGS/$1.log" | head -n 4 | cut -c1-200 | grep . ||
    tail -n 3 "$LOGS/$1.log" | cut -c1-200
}

# report CASE STATUS SECONDS LIMIT
report() {
  local verdict
  if (($2 == 0)); then
    verdict="ok  "
  elif (($2 == 124 || ($2 == 137 && $3 >= $4))); then
    verdict=TIME
  elif (($2 > 128)); then
    verdict=DIED
  else
    verdict=FAIL
  fi
  say "$verdict  $1 ($3 s) $(words_of "$1")"
}

ask_where() {
  local pipe
  for pipe in "$CORES/$1".pipe.*; do
    [[ -p $pipe ]] && timeout 1 dd if=/dev/zero of="$pipe" bs=1 count=1 status=none 2>/dev/null &
  done
}

run_part() {
  local part=$1 limit=$2 at_once=$3 end next=0 count=${#CASES[@]} name own i room
  local -a running=() still=()
  local -A began=() limit_of=() asked=()
  room=$(($(left) - RESERVE))
  ((limit > room)) && limit=$room
  end=$((SECONDS + limit))
  while ((next < count || ${#running[@]} > 0)); do
    while ((next < count && ${#running[@]} < at_once && SECONDS < end)); do
      name=$part.${CASES[next]}
      own=$((end - SECONDS))
      ((LIMITS[next] < own)) && own=${LIMITS[next]}
      began[$name]=$SECONDS limit_of[$name]=$own
      begin "$name" "$own" "${COMMANDS[next]}"
      running+=("$name")
      next=$((next + 1))
    done
    for ((i = next; SECONDS >= end && i < count; ++i)); do
      say "----  $part.${CASES[i]} no time was left"
      next=$count
    done
    sleep 0.1
    still=()
    for name in "${running[@]}"; do
      own=$((SECONDS - began[$name]))
      if [[ -e $STATES/$name.status ]]; then
        report "$name" "$(<"$STATES/$name.status")" "$own" "${limit_of[$name]}"
      elif ((own > limit_of[$name] + GRACE + 2)); then
        say "LOST  $name ($own s) it does not end"
      else
        still+=("$name")
        if [[ -n $DUMPS && -z ${asked[$name]-} ]] &&
          ((limit_of[$name] > 2 * DUMP_BEFORE && own >= limit_of[$name] - DUMP_BEFORE)); then
          asked[$name]=1
          ask_where "$name"
        fi
      fi
    done
    running=("${still[@]}")
  done
  CASES=() LIMITS=() COMMANDS=()
  pack
}

# Ends what was begun and has not ended; for the caller's trap.
end_all() {
  local file name
  for file in "$STATES"/*.pid; do
    name=${file%.pid}
    [[ -e $file && ! -e $name.status ]] && kill -TERM "$(<"$file")" 2>/dev/null
  done
}
