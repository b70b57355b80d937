#!/usr/bin/env bash
# Submit a recipe whole: a job for every stage of its pipeline, each after those whose output it reads. Prints the ids.
#   slurm/submit.sh ultrachat [sbatch options] [-- key.sub=value ...]
#   slurm/submit.sh openmath --nodes=2 --time=48:00:00 -- train.steps=1000
# Options go to the trainings; the other stages take one task on one node. A stage that fails cancels those behind it.
set -euo pipefail
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
recipe=$1 && shift
options=() settings=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1") && shift; done
[ $# -eq 0 ] || { shift; settings=("$@"); }
source slurm/site.sh
read_site
root=$(root_here "$recipe")
stages=$(python -m deltakd stages "$recipe" ${root:+"$root"} "${settings[@]}")
[ -n "$stages" ] || fail "$recipe: has no pipeline. Write RECIPE=$recipe sbatch slurm/deltakd_qwen.sbatch"
declare -A job
while read -r name kind needs; do
    after=
    for need in ${needs//,/ }; do [ "$need" = - ] || after+=:${job[$need]}; done
    command=(sbatch --parsable --job-name="$(basename "$recipe" .yaml)-$name" --kill-on-invalid-dep=yes ${after:+--dependency=afterok$after})
    if [ "$kind" = train ]; then
        command+=("${options[@]}" slurm/deltakd_qwen.sbatch)
    else
        command+=(slurm/stage.sbatch)
    fi
    id=$(RUN= SWEEP= RECIPE=$recipe STAGE=$name "${command[@]}" "${settings[@]}")
    job[$name]=${id%%;*}
    echo "$name ${job[$name]}${after:+ after ${after:1}}"
done <<<"$stages"
