# The steps of a job, for the sbatch files to read. Runs on the first node of the job, in the repository.

source slurm/site.sh

unset DELTAKD_LAUNCHERS  # whoever submitted the job may end before it

# Slurm sends USR1 before the time limit (--signal=B:USR1@...), whatever this script is doing then.
asked= training=
trap 'asked=1; say "the time limit is near: the run is asked to stop"; stop_students' USR1

# srun hands USR1 to every rank: students keep a checkpoint and leave with 75, teachers leave after them.
stop_students() { [ -z "$training" ] || kill -USR1 "$training" 2>/dev/null; }

# A task of an array is queued again alone; the id of one of its tasks is that of them all.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-$SLURM_JOB_ID}

# Have what the site gives to every rank.
read_surroundings() {
    read_site
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
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
    # A signal leaves 300 s before the limit; one that comes with less time (scancel: KillWait) ends in SIGKILL anyway.
    local root
    root=$(root_here "$recipe") || fail "$recipe: cannot be read."
    settings=("checkpoints.grace_s=240" ${root:+"$root"} ${SITE_INTERFACE:+"teachers.host=$SITE_INTERFACE"} "$@")
    if [ -n "${SWEEP:-}" ]; then
        local line
        line=$(sed -n "${SLURM_ARRAY_TASK_ID:?SWEEP wants sbatch --array=1-N}p" "$SWEEP")
        [ -n "$line" ] || fail "$SWEEP: no line $SLURM_ARRAY_TASK_ID. Write --array with the numbers of its lines."
        local words
        mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$line")  # which reads quotes around a setting with blanks
        settings+=("${words[@]}")
    fi
}

# Find where the ranks meet: the first node, at a port of this job's that is free there now, and no client's.
meet() {
    nodes=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}
    MASTER_ADDR=$(scontrol show hostnames "$nodes" | head -n 1)
    MASTER_PORT=$(python - "$((10000 + SLURM_JOB_ID % 20000))" <<'P'
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
    [ -n "$MASTER_PORT" ] || fail "no port is free on $MASTER_ADDR behind $((10000 + SLURM_JOB_ID % 20000))." 75
    # All nodes name their folders in shared memory, and the keys of their sockets, after this life of the job.
    DELTAKD_LAUNCH=job-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export MASTER_ADDR MASTER_PORT DELTAKD_LAUNCH
}

# Remove on every node what dead runs left in /dev/shm; a rank that was killed with its node's job step cannot.
tidy() {
    local group job nodes number seconds=120
    [ -z "$asked" ] || seconds=20  # the time limit is near, and the job has yet to queue itself again
    for group in $(seq 0 $((${SLURM_HET_SIZE:-1} - 1))); do
        job=$SLURM_JOB_ID${SLURM_HET_SIZE:++$group}
        # Asked anew: under --no-kill a lost node is the job's no more.
        nodes=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format "%i %N" | awk -v job="$job" '$1 == job {print $2}')
        nodes=${nodes:-$SLURM_JOB_NODELIST}  # a task of an array has an id of its own there
        number=$(scontrol show hostnames "$nodes" | wc -l)
        timeout --kill-after=5 "$seconds" srun ${SLURM_HET_SIZE:+--het-group=$group} --nodelist="$nodes" --nodes="$number" \
            --ntasks="$number" --ntasks-per-node=1 --overlap --label --quiet ${container[@]+"${container[@]}"} \
            python -m deltakd tidy || say "/dev/shm of $nodes may not have been swept"
    done
}

prepare() {
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    read_surroundings
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

# Start a step; what its ranks say is in NAME-<rank>.log, and what srun says of them in NAME.srun.
start() {
    local name=$1 cpus=SLURM_CPUS_PER_TASK${2:-}
    shift 2
    # srun has not taken the number of processors from sbatch since 22.05. Ranks may end as far apart as they need to.
    srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task="${!cpus:-1}" --output="$logs/$name-%t.log" --open-mode=append \
        ${container[@]+"${container[@]}"} "$@" 2>>"$logs/$name.srun" &
}

train() {
    local serving= rest=(--recipe "$recipe" "${stage[@]}")
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        start teacher _HET_GROUP_1 --het-group=1 python launchers/teacher.py "${rest[@]}" \
            --run "$run" --launch "$DELTAKD_LAUNCH" "${settings[@]}"
        serving=$!
        start student _HET_GROUP_0 --het-group=0 python launchers/train.py --external-teachers "${rest[@]}" \
            --launch "$DELTAKD_LAUNCH" "${settings[@]}"
    else
        start student "" python launchers/train.py "${rest[@]}" "${settings[@]}"
    fi
    training=$!
    [ -z "$asked" ] || stop_students
    teachers_ended=0
    while kill -0 "$training" 2>/dev/null; do
        sleep 1 &
        wait $!
        if [ -n "$serving" ] && ! kill -0 "$serving" 2>/dev/null && [ $((teachers_ended += 1)) = 30 ]; then
            say "the teachers have ended: the run is asked to stop"
            stop_students
        fi
    done
    training=
    [ -z "$serving" ] || { sleep 15 && kill -TERM "$serving" 2>/dev/null; } &  # students that were killed said nothing
    [ -z "$serving" ] || wait "$serving"
}

# Whether a rank ended by itself with this code. srun's own is the worst of all, those that it killed included; what
# teachers say counts if they ended before the students.
wrote() {
    local said=("$logs/student.srun")
    [ "$teachers_ended" -lt 30 ] || said+=("$logs/teacher.srun")
    grep -q "Exited with exit code $1\$" "${said[@]}"
}

settle() {
    tidy
    local stands code preempted
    cat "$logs"/*.srun
    stands=$(python -m deltakd outcome "$recipe" "${stage[@]}" "${settings[@]}" --job "$SLURM_JOB_ID" 2>&1)
    code=$?
    say "$stands"
    [ "$code" = 0 ] && exit 0
    grep -h "^deltakd" "$logs"/*.log | sort -u
    [ "$code" = 75 ] || exit "$code"
    wrote 2 && exit 2  # a fault that its reader must mend: another start would meet it again
    preempted=$(scontrol show job "$this_job" | grep -o "PreemptTime=[0-9][^ ]*")
    if wrote 75 && [ -z "$asked$preempted" ] && [ "$teachers_ended" -lt 30 ]; then
        exit 75  # somebody stopped it
    fi
    # Lost ranks, the time limit or preemption. A job that was cancelled is none that can be queued again.
    say "queued again"
    scontrol requeue Incomplete "$this_job" || fail "it cannot be queued again: submit it once more, it goes on." 75
    sleep 60 &  # until Slurm ends this script
    wait $!
    exit 75
}
