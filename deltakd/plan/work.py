"""What a step computes and moves: operations of student and frozen models, bytes over every way.

A parameter of a matrix costs two operations a token forward and four backward; attention two products with what came
before, the head three and each frozen head one on supervised tokens (the chunked loss). Element-wise work
is in the hardware's share of its peak.
"""

from dataclasses import dataclass
from math import ceil

from deltakd.plan.architecture import Architecture
from deltakd.plan.facts import BYTES, KINDS, Frozen, Run
from deltakd.plan.hardware import GB, Hardware
from deltakd.plan.memory import cached_bytes, layer_activations, weight_bytes, writers

_ADAMW_BYTES = 28  # of a float32 parameter: its gradient and both moments are read, moments and weight written
_PASSES = 4  # over kept activations: written, read, their gradients written and read


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one micro-batch of one student rank, and seconds of what follows from them."""

    student_flops: float
    frozen_flops: dict[str, float]  # of each model's answer, by role
    hbm_bytes: float  # the student's
    answer_hbm_bytes: dict[str, float]
    payload_bytes: float
    gather_bytes: float  # received from other ranks


def attention_flops(shape: Architecture, tokens: int, document: int, attention: str = "auto") -> float:
    """Return the operations of attention forward: scores and sums, half of them masked away.

    Eager attention computes all scores of the row, also between documents, and masks them afterwards.
    """
    seen = min(document, 2 * shape.window) if shape.window else document  # half of it, on average
    return 2.0 * shape.num_layers * tokens * (2 * tokens if attention == "eager" else seen) * shape.q


def student_flops(run: Run, tokens: int) -> float:
    """Return the operations of a micro-batch: forward, loss, backward, and forward again where it is recomputed."""
    shape, supervised = run.student, tokens * run.supervised
    adapters = run.recipe.models.lora is not None
    again = 1 if run.recipe.train.gradient_checkpointing else 0
    backbone = 2.0 * shape.backbone_matrices * tokens * (2 + again + (0 if adapters else 1))
    backbone += 6.0 * run.trained * tokens if adapters else 0.0
    attention = attention_flops(shape, tokens, run.document, run.recipe.models.attention) * (3 + again)
    head = 2.0 * shape.hidden_size * run.vocab_size * supervised * (2 if adapters else 3)
    return backbone + attention + head + 2.0 * run.vocab_size * supervised * sum(run.heads)


def frozen_flops(run: Run, one: Frozen, tokens: int) -> float:
    """Return the operations of a frozen model's answer; its head is multiplied where the payload is of its logits."""
    head = 0.0 if run.payload == "hidden" else 2.0 * one.shape.hidden_size * run.vocab_size * tokens * run.supervised
    attention = attention_flops(one.shape, tokens, run.document, run.recipe.models.attention)
    return 2.0 * one.shape.backbone_matrices * tokens + attention + head


def gather_bytes(run: Run, num_students: int) -> float:
    """Return what a rank receives in a micro-batch: sharded weights, twice, and its share of gradients."""
    engine, w, shape = run.recipe.engine, run.width, run.student
    rest = (num_students - 1) / num_students
    if engine.name == "single":
        return 0.0
    if engine.name == "fsdp2":  # layers again for their backward pass; the root once; float32 gradients
        weights = w * (2 * shape.num_layers * shape.layer_parameters + shape.outer_parameters)
        return (weights + 4 * run.trained) * rest
    if engine.zero_stage == 3:
        return (2 * w * shape.num_parameters + w * run.trained) * rest
    return w * run.trained * rest if engine.zero_stage == 2 else 0.0


def step_bytes(run: Run, num_students: int) -> float:
    """Return what a rank receives once a step: reduced gradients and new weights, unless weights are sharded."""
    engine = run.recipe.engine
    if engine.name != "deepspeed" or engine.zero_stage == 3:
        return 0.0
    gradients = 4 * run.trained if engine.zero_stage == 1 else 0
    return (gradients + run.width * run.trained) * (num_students - 1) / num_students


def work(run: Run, num_students: int) -> Work:
    """Count one micro-batch."""
    tokens, _ = run.micro_batch(num_students)
    w, supervised = run.width, int(tokens * run.supervised)
    kept = layer_activations(run.student, w, run.recipe.models.attention, tokens) * run.student.num_layers
    logits = 4 * 2 * supervised * run.vocab_size  # the loss reads and writes them about four times
    return Work(
        student_flops=student_flops(run, tokens),
        frozen_flops={role: frozen_flops(run, one, tokens) for role, one in run.frozen.items()},
        hbm_bytes=3 * w * run.student.num_parameters + _PASSES * tokens * kept + logits * w,
        answer_hbm_bytes={
            role: weight_bytes(one.shape, w, one.in_8bit) + 2 * tokens * w * one.shape.num_layers * one.shape.q
            for role, one in run.frozen.items()
        },
        payload_bytes=sum(run.payload_bytes(run.payload, supervised)) if run.frozen else 0,
        gather_bytes=gather_bytes(run, num_students),
    )


def update_s(run: Run, num_students: int, on_node: int, hardware: Hardware) -> float:
    """Return the seconds of an optimizer step, which memory binds; offloaded state crosses PCIe and is the host's."""
    share = 1 if run.recipe.engine.name == "single" else num_students
    state = _ADAMW_BYTES * run.trained / share
    if getattr(run.recipe.engine, "offload", "none") == "none":
        return state / (hardware.hbm_gbs * GB)
    host = hardware.host_gbs * GB / on_node
    return state / host + (4 + run.width) * run.trained / share / (hardware.pcie_gbs * GB)


def writing_s(run: Run, num_students: int, hardware: Hardware) -> float:
    """Return the seconds a step, on average, in which the student writes, and a teacher with it: weights are read once
    for each token.

    Assumes answers of max_new_tokens, or of half a document where that is less.
    """
    rollouts, flops = run.recipe.rollouts, hardware.flops(run.recipe.models.dtype)
    if not rollouts.are_written:
        return 0.0
    prompts = ceil(run.recipe.train.tokens_per_step / run.document / num_students)
    batch = min(prompts, rollouts.batch_size)
    new = min(rollouts.max_new_tokens, max(1, run.document // 2))
    each = 0.0
    for shape, held in writers(run):
        read = (held + cached_bytes(run, shape, batch, run.document)) / (hardware.hbm_gbs * GB)
        each += max(read, 2.0 * shape.num_parameters * batch / flops)
    return rollouts.on_policy_fraction * ceil(prompts / batch) * new * each


def traffic(run: Run, num_students: int, on_node: int, hardware: Hardware) -> list[dict[str, object]]:
    """Return what each payload kind would move in a step of one node: a row of bytes for every kind.

    PCIe counts one way (out of teachers, and as much into students); host memory one write and one read; the network
    is taken only by teachers of other nodes.
    """
    tokens, micro_batches = run.micro_batch(num_students)
    supervised = int(tokens * run.supervised)
    rows: list[dict[str, object]] = []
    for kind in KINDS if run.frozen else ():
        moved = sum(run.payload_bytes(kind, supervised)) * micro_batches * on_node
        rows.append(
            {
                "payload": kind,
                "bytes_per_token": sum(run.payload_bytes(kind, 64)) / 64,
                "arena_bytes": run.arena_bytes(kind),
                "pcie_bytes": moved,
                "host_bytes": 2 * moved,
                "network_bytes": moved,
                "pcie_s": moved / on_node / (hardware.pcie_gbs * GB),
                "network_s": moved / (hardware.network_gbs * GB),
                "refused": run.allows(kind),
                "precision": BYTES[run.recipe.references.dtype],
            }
        )
    return rows
