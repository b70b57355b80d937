# The steps of a job, for the sbatch files to read. Runs on the first node of the job, in the repository.

say() { echo "$(date +%T) $*"; }
fail() { say "$1" >&2; exit "${2:-2}"; }

# Read the site's settings and have its python.
read_site() {
    if [ -f slurm/site.env ]; then
        set -a && source slurm/site.env && set +a
    fi
    local name
    for name in ${SITE_MODULES:-}; do module load "$name" || fail "slurm/site.env: no module $name."; done
    source "${SITE_VENV:-.venv}/bin/activate" || fail "slurm/site.env: SITE_VENV holds no environment. Run make install."
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun has not taken it from sbatch since 22.05
    if [ -n "${SITE_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$SITE_INTERFACE GLOO_SOCKET_IFNAME=$SITE_INTERFACE
    fi
    container=()
    [ -z "${SITE_CONTAINER:-}" ] || container=(--container-image="$SITE_CONTAINER" --container-workdir="$PWD"
        ${SITE_CONTAINER_MOUNTS:+--container-mounts="$SITE_CONTAINER_MOUNTS"})
}

# Put together which training this is: recipe, stage and settings, those of the site first and those of the array last.
read_settings() {
    recipe=${RECIPE:-ultrachat}
    stage=(${STAGE:+--stage "$STAGE"})
    settings=(${SITE_SCRATCH:+"root=$SITE_SCRATCH/$(basename "$recipe" .yaml)"} ${SITE_INTERFACE:+"teachers.host=$SITE_INTERFACE"} "$@")
    if [ -n "${SWEEP:-}" ]; then
        local line
        line=$(sed -n "${SLURM_ARRAY_TASK_ID:?SWEEP wants sbatch --array=1-N}p" "$SWEEP")
        [ -n "$line" ] || fail "$SWEEP: no line $SLURM_ARRAY_TASK_ID. Write --array with the numbers of its lines."
        local words
        read -r -a words <<<"$line"
        settings+=("${words[@]}")
    fi
}

# Find where the ranks meet: the first node, at a port of this job's that is free there now.
meet() {
    nodes=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}
    MASTER_ADDR=$(scontrol show hostnames "$nodes" | head -n 1)
    MASTER_PORT=$(python - "$((20000 + SLURM_JOB_ID % 40000))" <<'P'
import socket, sys
for port in range(int(sys.argv[1]), int(sys.argv[1]) + 100):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
        print(port)
        break
P
    )
    [ -n "$MASTER_PORT" ] || fail "no port is free on $MASTER_ADDR behind $((20000 + SLURM_JOB_ID % 40000))." 75
    # All nodes name their folders in shared memory, and the keys of their sockets, after this life of the job.
    DELTAKD_LAUNCH=job-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export MASTER_ADDR MASTER_PORT DELTAKD_LAUNCH
}

# Remove on every node what dead runs left in /dev/shm; a rank that was killed with its node's job step cannot.
tidy() {
    local group
    for group in $(seq 0 $((${SLURM_HET_SIZE:-1} - 1))); do
        local size=SLURM_JOB_NUM_NODES_HET_GROUP_$group
        [ -n "${SLURM_HET_SIZE:-}" ] || size=SLURM_JOB_NUM_NODES
        srun ${SLURM_HET_SIZE:+--het-group=$group} --nodes="${!size}" --ntasks="${!size}" --ntasks-per-node=1 \
            --label --quiet "${container[@]}" python -m deltakd tidy
    done
}

prepare() {
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    read_site
    read_settings "$@"
    tidy
    meet
    local stands
    stands=$(python -m deltakd outcome "$recipe" "${stage[@]}" "${settings[@]}" --job "$SLURM_JOB_ID" --begins) || exit $?
    say "$stands"
    run=${stands%%: *}
    logs=$run/logs/$DELTAKD_LAUNCH
    mkdir -p "$logs"
    say "ranks meet at $MASTER_ADDR:$MASTER_PORT; their output is in $logs/"
}

# Start a step in which every task lives as slurm/rank.sh has it; its logs and codes are named after the first word.
start() {
    local name=$1
    shift
    srun --kill-on-bad-exit=1 --output="$logs/$name-%t.log" --open-mode=append "${container[@]}" "$@" &
}

train() {
    asked=
    local serving=0
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        start teacher --het-group=1 bash slurm/rank.sh "$logs/teacher" python launchers/teacher.py \
            --recipe "$recipe" "${stage[@]}" --run "$run" --launch "$DELTAKD_LAUNCH" "${settings[@]}"
        serving=$!
        start student --het-group=0 bash slurm/rank.sh "$logs/student" python launchers/train.py --external-teachers \
            --recipe "$recipe" "${stage[@]}" --launch "$DELTAKD_LAUNCH" "${settings[@]}"
    else
        start rank bash slurm/rank.sh "$logs/rank" python launchers/train.py \
            --recipe "$recipe" "${stage[@]}" "${settings[@]}"
    fi
    local training=$!
    # USR1 comes before the time limit, and srun hands it to every rank: they keep a checkpoint and leave with 75.
    trap 'asked=1; say "the time limit is near: the run is asked to stop"; kill -USR1 $training' USR1
    while kill -0 "$training" 2>/dev/null; do wait "$training"; done
    trap - USR1
    [ "$serving" = 0 ] || wait "$serving"
}

# The worst code that a rank wrote of itself; srun's own is that of ranks which it killed for another's sake as well.
wrote() { cat "$logs"/*.code 2>/dev/null | grep -qx "$1"; }

settle() {
    tidy
    local stands code
    stands=$(python -m deltakd outcome "$recipe" "${stage[@]}" "${settings[@]}" --job "$SLURM_JOB_ID" 2>&1)
    code=$?
    say "$stands"
    [ "$code" = 0 ] && exit 0
    grep -h "^deltakd" "$logs"/*.log | sort -u
    [ "$code" = 75 ] || exit "$code"
    wrote 2 && exit 2  # a fault that its reader must mend: another start would meet it again
    local preempted
    preempted=$(scontrol show job "$SLURM_JOB_ID" | grep -o "PreemptTime=[0-9][^ ]*")
    if wrote 75 && [ -z "$asked$preempted" ]; then
        exit 75  # somebody stopped it
    fi
    # Lost ranks, the time limit or preemption. A job that was cancelled is not running any more, and stays so.
    [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T | head -n 1)" = RUNNING ] || exit 75
    say "queued again"
    scontrol requeue "$SLURM_JOB_ID" || fail "it cannot be queued again: submit it once more, it goes on." 75
    sleep 60  # until Slurm ends this script
    exit 75
}
