#!/usr/bin/env bash
# Start teacher ranks and student ranks of a recipe on this machine, without deepspeed's launcher:
#   launchers/local.sh quickstart [STUDENTS] [TEACHERS] [--resume] [key.sub=value ...]
# With no teachers (0) a single student starts one beside itself; several need references.from=in_process or cache.
# Every rank's output is in the terminal; the first one that fails ends all, and Ctrl-C does too.
set -u
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
recipe=$1 && shift
students=1 teachers=1
case ${1:-} in [0-9]*) students=$1 && shift ;; esac
case ${1:-} in [0-9]*) teachers=$1 && shift ;; esac
[ "$students" -gt 0 ] || { echo "local.sh: 0 students have nothing to train. Start 1 or more." >&2; exit 2; }
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MASTER_ADDR=127.0.0.1
# A free port, asked of the kernel; two runs on one machine do not meet.
MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2
export MASTER_PORT
launch=local-$$
teaching=()
[ "$teachers" -gt 0 ] && teaching=(--external-teachers teachers.per_node="$teachers")
export DELTAKD_LAUNCHERS=$$  # ranks end with this script, even if it is gone before they look for it

for_teachers=()
for word in "$@"; do [ "$word" = --resume ] || for_teachers+=("$word"); done
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM
for ((index = 0; index < teachers; index++)); do
    "$python" "$here/teacher.py" --recipe "$recipe" --launch "$launch" --index "$index" --students "$students" \
        --device "cuda:$((students + index))" teachers.per_node="$teachers" ${for_teachers[@]+"${for_teachers[@]}"} &
    pids+=($!)
done
for ((rank = 0; rank < students; rank++)); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$students LOCAL_WORLD_SIZE=$students \
        "$python" "$here/train.py" --recipe "$recipe" --launch "$launch" "${teaching[@]}" "$@" &
    pids+=($!)
done
# The run is over when every rank has ended well, or when the first has not.
for _ in "${pids[@]}"; do
    wait -n || exit $?
done
