"""A teacher in two processes, in a process of its own (it has a process group, as tests beside it may): what it says.

python tests/teacher/leader.py LAB OUT          OUT gets everything that test_shards.py compares
python tests/teacher/leader.py LAB              a forward that does not end
"""

import sys
import threading
from pathlib import Path

import psutil
import torch

from deltakd.losses import objective
from deltakd.teacher.payloads import FrozenModels, PayloadSpec
from deltakd.teacher.shards import Job, ShardGroup
from tests.teacher.contract import DELTA, FLOAT32, batches

FOLDERS = {"teacher": "teacher", "teacher_raw": "teacher_raw", "student_raw": "student", "odd": "odd"}
KINDS = ("hidden", "logits", "target", "top_k", "sampled")
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def spec_of(kind):
    return PayloadSpec(kind, "float32", "packed", 300, {"top_k": 8, "sampled": 5}.get(kind, 0))


def payloads(models, kind, group=None):
    """Every payload of a kind about batches of documents of 5 to 10 tokens, by name."""
    frozen = FrozenModels(models, spec_of(kind), objective(DELTA), 7, group)
    names = sorted(models) if frozen.spec.keeps_models_apart else ["target"]
    return {name: [frozen.payload(name, batch, alpha, b"tokens") for batch, alpha in batches(6)] for name in names}


def listening(pid):
    connections = psutil.Process(pid).net_connections("inet")
    return {one.laddr.ip for one in connections if one.status == "LISTEN"}


def tell(models, group):
    heads = {role: model.get_output_embeddings().weight for role, model in models.items()}
    layers = {role: model.get_decoder().layers[0] for role, model in models.items()}
    return {
        "payloads": {kind: payloads(models, kind, group) for kind in KINDS},
        "again": {kind: payloads(models, kind, group) for kind in KINDS},
        "heads": {role: head.detach().clone() for role, head in heads.items()},
        "sizes": {
            role: {part: layer.get_submodule(part).weight.to_local().numel() for part in PARTS}
            for role, layer in layers.items()
        },
        "listening": listening(None) | listening(group.workers[0].pid),
    }


def main(lab, out=None):
    torch.set_num_threads(1)
    weights = {role: (f"models.{role}", f"{lab}/{folder}") for role, folder in FOLDERS.items()}
    weights["again"] = weights["teacher"]  # two names for one folder, which is loaded once
    job = Job(FLOAT32.model_dump(mode="json"), weights, "packed", ["cpu", "cpu"], 0.2, 120.0)
    with ShardGroup(job, "0", 60.0, 60.0 if out else 1.0) as group:
        models = group.load()
        if out is None:
            print(group.workers[0].pid, flush=True)
            group.forward("teacher", batches(1)[0][0], threading.Event().wait)
        assert models.pop("again") is models["teacher"]
        torch.save(tell(models, group), Path(out))
    assert group.workers[0].returncode is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
