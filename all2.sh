export PYTHONPATH=/tmp/planner OMP_NUM_THREADS=1; P=/work/main/.venv/bin/python
while pgrep -f all.sh >/dev/null; do sleep 1; done
$P base.py >/dev/null 2>&1
run() { d=$1; n=$2; shift 2; rm -rf $d/runs/$n; $P peaks.py log_$n.txt $P -m deltakd train $d/step.yaml run=$n data.format=text data.train.num_rows=60 train.steps=4 "$@" > out_$n.txt 2>&1; }
export MALLOC_MMAP_THRESHOLD_=131072 MALLOC_TRIM_THRESHOLD_=131072
run base b_sft objective.sft_weight=1.0
run base b_service
run base b_z3 --processes 2 "engine={name: deepspeed, zero_stage: 3}"
run small m_lora objective.sft_weight=1.0 "models.lora={rank: 8}"
run small m_fsdp objective.sft_weight=1.0 --processes 1 "engine={name: fsdp2}"
run base b_fsdp objective.sft_weight=1.0 --processes 1 "engine={name: fsdp2}"
run small m_z2 objective.sft_weight=1.0 --processes 1 "engine={name: deepspeed, zero_stage: 2}"
