"""How many bytes each process holds at its peak, by part; what is on the device, and what in the node's host memory.

Counted from the code that allocates it: the engines, the chunked loss, transformers' decoders in plain torch. What
libraries keep for themselves is in the hardware's `context_gib` and `reserve`. Bytes of a step's two peaks: the end of
a forward pass, with all activations, and the update, with what the norm and AdamW take for a moment.

h, q, kv, i: widths of hidden states, queries, keys and the feed-forward part. w: bytes of a number of the forward pass.
"""

from dataclasses import dataclass

from deltakd.plan.architecture import Architecture
from deltakd.plan.facts import BYTES, Run
from deltakd.plan.hardware import GIB, Hardware

_BUCKET = int(5e8)  # elements of DeepSpeed's reduce bucket
_LIVE = int(1e9)  # elements that ZeRO-3 may keep gathered
_CPU_BLOCK = 2**19  # elements of one element-wise block of the loss on a CPU
_TARGET_CHUNK = 256  # tokens for which a teacher holds float32 logits


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, on its device and in host memory, by part."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def on_device(self) -> float:
        """All that the device holds."""
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        """All that the node's memory holds of it."""
        return sum(self.host.values())

    def beside(self, other: "Memory") -> "Memory":
        """Return two processes on one device."""
        named = {f"teacher's {name}": size for name, size in other.device.items()}
        return Memory(self.device | named, self.host | {f"teacher's {name}": s for name, s in other.host.items()})


def layer_activations(shape: Architecture, w: int, attention: str, tokens: int) -> float:
    """Return the bytes a token that one layer keeps for its backward pass, in a row of so many tokens.

    A norm keeps its input in float32, its normalised input and its output; attention its rotated queries and keys, the
    values, and its output twice (documents are put side by side again); the feed-forward part four intermediate widths.
    Eager attention keeps scores of the whole row.
    """
    h, q, kv, i = shape.hidden_size, shape.q, shape.kv, shape.intermediate_size
    norms = shape.norms_per_layer * (h * (4 + 2 * w) + 4)
    if shape.norms_in_float32:  # of four, as Gemma 2 has, two outputs are only added
        norms = shape.norms_per_layer * (8 * h + 4) + 2 * h * w
    if attention == "eager":
        capped = 2 if shape.norms_per_layer == 4 else 1  # scores, once more where tanh caps them
        return norms + 4 * w * q + 4 * w * i + shape.num_heads * tokens * (capped * w + (4 if w == 2 else 0))
    return norms + w * (q + 2 * kv) + 2 * w * q + 4 * shape.num_heads + 4 * w * i


def activations(run: Run, tokens: int) -> float:
    """Return what the student keeps between forward and backward, and what the backward pass itself takes."""
    shape, w, models = run.student, run.width, run.recipe.models
    layer = tokens * layer_activations(shape, w, models.attention, tokens)
    passing = tokens * w * (2 * shape.intermediate_size + 2 * shape.hidden_size)  # gradients on their way
    if models.lora is not None:  # an input of each adapter's second matrix
        layer += tokens * w * models.lora.rank * len(shape.linear)
    if run.recipe.train.gradient_checkpointing:
        return shape.num_layers * tokens * w * shape.hidden_size + layer + passing
    return shape.num_layers * layer + passing


def loss_buffers(run: Run, supervised: int, hardware: Hardware) -> float:
    """Return what the chunked loss holds beside its inputs: chunks of logits, blocks, gradients of states and head."""
    w, vocab, h = run.width, run.vocab_size, run.student.hidden_size
    chunk = min(run.recipe.objective.chunk_tokens, max(supervised, 1))
    products = len(run.heads) if w == 2 else min(1, len(run.heads))
    block = min(_CPU_BLOCK, chunk * vocab) if hardware.is_cpu else chunk * vocab
    head = 0 if run.recipe.models.lora is not None else vocab * h * (4 + w if w == 2 else 4)
    return chunk * vocab * w * (1 + products) + 4 * block * hardware.temporaries + 2 * w * supervised * h + head


def optimizer_state(run: Run, num_students: int) -> dict[str, float]:
    """Return bytes of weights, master weights, gradients and AdamW's moments of one student rank, by engine."""
    engine, w, own = run.recipe.engine, run.width, run.trained
    adapters = own if run.recipe.models.lora is not None else 0
    whole = run.student.num_parameters + adapters
    share = num_students
    if engine.name == "single":
        wide = 4 * own if w == 2 else 0
        return {"weights": w * whole, "master weights": wide, "gradients": 4 * own + wide / 2, "optimizer": 8 * own}
    if engine.name == "fsdp2":  # float32 weights are the masters
        return {"weights": 4 * whole / share, "gradients": 4 * own / share, "optimizer": 8 * own / share}
    kept = {"master weights": 4 * own / share, "optimizer": 8 * own / share}
    if engine.zero_stage == 3:
        return {"weights": w * whole / share, "gradients": 4 * own / share} | kept
    # Stage 1 sums whole gradients in float32; stage 2 its share, beside those of one backward pass.
    sums = 4 * own + (w * own if w == 2 else 0) if engine.zero_stage == 1 else 4 * own / share + w * min(own, _BUCKET)
    return {"weights": w * whole, "gradients": sums} | kept


def gathered(run: Run, num_students: int, hardware: Hardware) -> float:
    """Return what a sharded engine holds for a moment: weights of other ranks, and buckets of gradients."""
    engine, w, shape = run.recipe.engine, run.width, run.student
    if engine.name == "single":
        return 0.0
    outer, layer = shape.outer_parameters, shape.layer_parameters
    if engine.name == "fsdp2":  # the root stays gathered; two layers; their gradients, and float32 to reduce them in
        gradients = (w + 4) * max(outer, layer) if run.recipe.models.lora is None else 0
        return w * (outer + 2 * layer) + gradients
    bucket = w * (min(run.trained, _BUCKET) if hardware.is_cpu else _BUCKET)
    if engine.zero_stage < 3 or (num_students == 1 and engine.offload != "all"):
        return bucket
    return bucket + w * min(shape.num_parameters, _LIVE + outer)


def update_bytes(run: Run, num_students: int, hardware: Hardware) -> float:
    """Return what the gradient's norm and the update take beside the state."""
    engine, own, lora = run.recipe.engine, run.trained, run.recipe.models.lora
    largest = run.student.embedding_parameters if lora is None else lora.rank * run.student.intermediate_size
    share = 1 if engine.name == "single" else num_students
    # The norm squares one gradient in float64; AdamW on a GPU takes one tensor of all, on a CPU of one parameter.
    norm = 16 * min(largest, own / share if engine.name != "deepspeed" or engine.zero_stage == 3 else largest)
    adamw = (4 * largest if hardware.is_cpu else 4 * own) / share
    if engine.name == "deepspeed":
        adamw += 4 * own / share  # the shard's gradient once more, flat
        if engine.zero_stage < 3:
            norm += 4 * own  # every gradient whole, at once
    return max(norm, adamw)


def student_memory(run: Run, num_students: int, hardware: Hardware) -> Memory:
    """Return what a student rank holds."""
    tokens, micro_batches = run.micro_batch(num_students)
    supervised = int(tokens * run.supervised)
    state, host = optimizer_state(run, num_students), {}
    offload = getattr(run.recipe.engine, "offload", "none")
    if offload != "none":
        waiting = {"master weights", "optimizer", "gradients"} | ({"weights"} if offload == "all" else set())
        host = {name: state.pop(name) for name in waiting & set(state)}
    passing = {
        "activations": activations(run, tokens),
        "loss": loss_buffers(run, supervised, hardware),
        "gathered": gathered(run, num_students, hardware),
    }
    # Gradients of a step's only micro-batch come as its activations go; ZeRO-3 allocates their place once for all.
    comes_late = micro_batches == 1 and getattr(run.recipe.engine, "zero_stage", 0) != 3
    late = state.pop("gradients", 0.0) if comes_late else 0.0
    each = 0 if hardware.is_cpu or not run.frozen else sum(run.payload_bytes(run.payload, supervised))
    device = {"context": hardware.context_gib * GIB} | state | passing
    device["frozen heads"] = run.vocab_size * sum(run.heads) * run.width
    device["payloads"] = each
    device["rollouts' copy"] = writing_bytes(run)
    update = late + update_bytes(run, num_students, hardware)
    device["update, beyond these"] = max(0.0, update - sum(passing.values()))
    if run.frozen and run.recipe.references.source == "in_process":
        device |= {f"frozen {name}": size for name, size in frozen_bytes(run, list(run.frozen), tokens).items()}
    if run.asks_service:
        host["arena"] = run.arena_bytes(run.payload)
    if run.recipe.rollouts.are_written:  # gathered whole on every rank when the copy takes new weights
        host["weights for the copy"] = run.width * run.student.num_parameters
    return Memory(_some(device), _some(host))


def writers(run: Run) -> list[tuple[Architecture, float]]:
    """Return the models that write, with the bytes of their weights: a whole copy of the student, and a teacher beside
    it whose tokens are mixed in."""
    found = [(run.student, float(run.width * run.student.num_parameters))]
    if run.recipe.rollouts.teacher_mix and (teacher := run.frozen.get("teacher")):
        found.append((teacher.shape, weight_bytes(teacher.shape, run.width, teacher.in_8bit)))
    return found


def cached_bytes(run: Run, shape: Architecture, rows: int, tokens: int) -> float:
    """Return the keys and values of so many rows of so many tokens."""
    return float(rows * tokens * 2 * shape.kv * shape.num_layers * run.width)


def writing_bytes(run: Run) -> float:
    """Return the models that write, and their keys and values while they do."""
    rollouts, tokens = run.recipe.rollouts, run.recipe.data.max_tokens
    if not rollouts.are_written:
        return 0.0
    return sum(held + cached_bytes(run, shape, rollouts.batch_size, tokens) for shape, held in writers(run))


def weight_bytes(shape: Architecture, w: int, in_8bit: bool = False, split: int = 1) -> float:
    """Return the weights of a frozen model in one of `split` processes; head and a tied embedding stay whole."""
    layers = shape.num_layers * (shape.layer_matrices * (1 if in_8bit else w) + 4 * shape.hidden_size * w) / split
    return layers + w * shape.outer_parameters


def frozen_bytes(run: Run, roles: list[str], tokens: int, split: int = 1) -> dict[str, float]:
    """Return what frozen models hold in a process that serves some roles: weights, one layer's forward, payloads."""
    w, vocab, supervised = run.width, run.vocab_size, int(tokens * run.supervised)
    models = {f"{run.frozen[role].weights} {run.frozen[role].in_8bit}": run.frozen[role] for role in roles}
    each = BYTES[run.recipe.references.dtype]
    widest = max((one.shape for one in models.values()), key=lambda shape: shape.intermediate_size)
    layer = widest.hidden_size * (4 + 3 * w) + w * (widest.q + 2 * widest.kv + 3 * widest.intermediate_size) / split
    kind, sent = run.payload, supervised * max(one.shape.hidden_size for one in models.values()) * (w + each)
    if kind == "logits":
        sent += supervised * vocab * (w + each)
    elif kind != "hidden":
        sent = supervised * w * sum(run.frozen[role].shape.hidden_size for role in roles)
        sent += _TARGET_CHUNK * vocab * (4 * 4 + w) + 2 * sum(run.payload_bytes(kind, supervised))
    return {
        "weights": sum(weight_bytes(one.shape, w, one.in_8bit, split) for one in models.values()),
        "forward pass": tokens * layer,
        "payloads": sent,
    }


def teacher_memory(run: Run, roles: list[str], num_students: int, hardware: Hardware) -> Memory:
    """Return what one process of a teacher rank holds; a rank of several processes has its models split over them."""
    tokens, _ = run.micro_batch(num_students)
    device = {"context": hardware.context_gib * GIB}
    return Memory(device | frozen_bytes(run, roles, tokens, run.recipe.teachers.tensor_parallel), {})


def _some(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}
