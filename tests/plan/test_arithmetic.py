"""The planner's arithmetic beside the code that it speaks of: parameters, kept tensors, operations, payloads, slots."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deltakd.losses.linear import linear_loss
from deltakd.losses.objectives import objective
from deltakd.models.attention import register_documents
from deltakd.models.forward import TokenBatch, head_weight, supervised_hidden
from deltakd.plan import facts, memory, work
from deltakd.plan.architecture import from_config, known_models, read_architecture
from deltakd.plan.hardware import read_hardware
from deltakd.plan.split import Cluster, splits
from deltakd.recipe.load import load
from deltakd.teacher.arena import slot_bytes_for
from deltakd.teacher.payloads import PayloadSpec

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "head_dim": 16,
}
# As model cards have them, in billions; what models.yaml itself says is counted to the last one.
CARDS = {"Qwen/Qwen2.5-7B": 7.62, "Qwen/Qwen2.5-1.5B": 1.54, "Qwen/Qwen2.5-72B": 72.7, "meta-llama/Llama-3.1-8B": 8.03}


def model_of(kind, num_layers, dtype=torch.float32, vocab_size=300, device="cpu"):
    from transformers import AutoConfig, AutoModelForCausalLM

    given = SIZES | {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "tie_word_embeddings": kind != "llama"}
    config = AutoConfig.for_model(kind, **given)
    implementation = "eager" if kind == "gemma2" else register_documents()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation).train()
    return model, from_config("here", kind, json.loads(config.to_json_string(use_diff=False)))


def batch_of(num_tokens):
    half = num_tokens // 2
    positions = torch.cat([torch.arange(half)] * 2)
    return TokenBatch(
        torch.arange(num_tokens) % 300, positions, torch.tensor([0, half, num_tokens]), torch.arange(num_tokens)
    )


def run_of(name="ultrachat", *overrides, document=None):
    loaded = load(name, overrides)
    return facts.read_run(name, overrides, loaded.recipe, loaded.where, 0.6, document)


@pytest.mark.parametrize("name", known_models())
def test_known_sizes_come_to_the_parameters_that_the_weights_hold(name):
    shape = read_architecture("here", name)
    assert shape.num_parameters == known_models()[name]["parameters"]
    if name in CARDS:
        assert shape.num_parameters / 1e9 == pytest.approx(CARDS[name], abs=0.005 if CARDS[name] < 10 else 0.05)
    assert read_architecture("here", f"{name}-Instruct").num_parameters == shape.num_parameters


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2"])
def test_parameters_are_those_of_the_model_that_transformers_makes(kind):
    model, shape = model_of(kind, 3, device="meta")
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma", "gemma2"])
def test_what_a_layer_keeps_for_its_backward_pass_is_what_autograd_keeps(kind, dtype):
    """A second layer adds what one layer keeps; memory that weights lie in is not counted. Within 1%."""

    def kept(num_layers):
        model, shape = model_of(kind, num_layers, dtype)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = supervised_hidden(model, batch_of(128), "packed")
        assert hidden.requires_grad
        return sum(sizes.values()) / 128, shape

    (one, _), (two, shape) = kept(1), kept(2)
    attention = "eager" if kind == "gemma2" else "auto"
    assert memory.layer_activations(shape, dtype.itemsize, attention, 128) == pytest.approx(two - one, rel=0.01)


def test_operations_of_forward_loss_and_backward_are_those_that_torch_counts():
    """Matrix products, that is. torch counts neither attention on a CPU nor sums in place (the head's gradient)."""
    model, shape = model_of("qwen2", 2)
    plain = objective({"sft_weight": 1.0})
    with FlopCounterMode(display=False) as counted:
        hidden = supervised_hidden(model, batch_of(128), "packed")
        head = head_weight(model)
        linear_loss(hidden, head, {}, torch.zeros(128, dtype=torch.int64), plain).total.backward()
    run = run_of("ultrachat", "objective.sft_weight=1.0", "train.gradient_checkpointing=false", "data.supervise=all")
    run = dataclasses.replace(run, student=shape)
    attention = 3 * work.attention_flops(shape, 128, run.document)
    assert work.student_flops(run, 128) - attention == counted.get_total_flops() + 2 * 128 * head.numel()


def test_eager_attention_computes_every_score_of_the_row():
    model, shape = model_of("gemma2", 1)
    with FlopCounterMode(display=False) as counted:
        supervised_hidden(model, batch_of(128), "packed")
    scores = counted.get_total_flops() - 2 * shape.backbone_matrices * 128
    assert work.attention_flops(shape, 128, 64, "eager") == scores
    assert work.attention_flops(shape, 128, 64) == scores / 4  # of the documents' own, half


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", facts.KINDS)
def test_payloads_and_slots_have_the_size_that_the_service_gives_them(kind, tail):
    overrides = [f"references.payload={kind}", f"references.tail={str(tail).lower()}", "references.dtype=bfloat16"]
    run = run_of("ultrachat", *overrides)
    size = {"top_k": 64, "sampled": 64}.get(kind, 0)
    spec = PayloadSpec(kind, "bfloat16", "packed", 151_936, size, tail)
    widths = [1536, 3584, 3584] if spec.keeps_models_apart else [0]
    assert sorted(run.payload_bytes(kind, 1001)) == [spec.num_bytes(1001, width) for width in widths]
    slot = slot_bytes_for(max(spec.num_bytes(8192, width) for width in widths))
    assert run.arena_bytes(kind) == 4 * len(widths) * slot  # look_ahead 2, and two more


def test_where_all_share_a_memory_every_teacher_counts_with_what_it_serves_itself():
    run = run_of("ultrachat", "teachers={per_node: 3, serves: [[teacher], [teacher_raw], [student_raw]]}")
    small = dataclasses.replace(read_hardware()["CPU"], memory_gib=16, host_memory_gib=16)
    (split,) = splits(run, Cluster(small, 4, 1))
    served = [part.on_device for name, part in split.memory.items() if name != "student"]
    whole = (split.memory["student"].on_device + split.host_bytes + sum(served)) / 2**30
    assert len(served) == 3 and split.lacking.startswith(f"the whole node needs {whole:,.1f} GiB")


def test_a_target_cannot_be_had_of_teachers_that_serve_one_model_each():
    run = run_of("ultrachat", "teachers={per_node: 3, serves: [[teacher], [teacher_raw], [student_raw]]}")
    assert [kind for kind in facts.KINDS if run.allows(kind) is None] == ["hidden", "logits"]
    assert all(run_of("ultrachat").allows(kind) is None for kind in facts.KINDS)


def state_of(num_students, *overrides):
    return sum(memory.optimizer_state(run_of("ultrachat", *overrides), num_students).values()) / 1_543_714_304


def test_bytes_of_a_parameter_are_those_of_the_engines():
    """bf16 weights 2, masters 4, moments 8, float32 gradients 4; the last is ZeRO's paper, with wide gradients."""
    assert state_of(1) == 18 and state_of(8) == 18 / 8
    assert state_of(8, "engine.zero_stage=1") == 2 + (4 + 2) + 12 / 8  # gradients whole, in both precisions
    assert state_of(8, "engine={name: fsdp2}") == 16 / 8
    assert state_of(1, "engine={name: single}", "models.dtype=float32") == 16
    assert state_of(1, "engine={name: single}") == 2 + 4 + (4 + 2) + 8
    assert state_of(8, "models.lora={rank: 16}") < 0.3  # frozen weights, sharded; next to nothing beside them


def test_a_rank_receives_what_its_collectives_move():
    """Of P parameters in 2 bytes over 4 ranks, three quarters come from others, and as often as they are gathered."""
    received = {}
    for stage in (1, 2, 3):
        run = run_of("ultrachat", f"engine.zero_stage={stage}")
        of_all = 0.75 * run.student.num_parameters
        received[stage] = (work.gather_bytes(run, 4) / of_all, work.step_bytes(run, 4) / of_all)
    assert received == {1: (0, 4 + 2), 2: (2, 2), 3: (2 * 2 + 2, 0)}  # a micro-batch; a step
    rows = work.traffic(run, 8, 4, read_hardware()["H100"])
    assert all(row["network_bytes"] == row["pcie_bytes"] > 0 for row in rows)
    h100 = read_hardware()["H100"]
    assert 8 * h100.between(2, 8) == h100.between(2, 1) < h100.between(1, 8)


def test_weights_that_wait_in_host_memory_are_not_on_the_device():
    runs = [run_of("ultrachat", f"engine={{name: fsdp2, offload: {one}}}") for one in ("none", "all")]
    here, waiting = (memory.student_memory(run, 8, read_hardware()["H100"]) for run in runs)
    assert "weights" in here.device and "weights" not in here.host
    assert "weights" in waiting.host and "weights" not in waiting.device


def test_each_part_of_the_state_has_its_bytes_by_name():
    """An offload takes parts by their names: what is a gradient must not be called a weight."""
    p = run_of().student.num_parameters
    assert memory.optimizer_state(run_of(), 8) == {
        "weights": 2 * p / 8,
        "master weights": 4 * p / 8,
        "gradients": 4 * p / 8,
        "optimizer": 8 * p / 8,
    }
    stage_2 = memory.optimizer_state(run_of("ultrachat", "engine.zero_stage=2"), 8)
    assert (stage_2["weights"], stage_2["optimizer"]) == (2 * p, 8 * p / 8)
    assert stage_2["gradients"] == 4 * p / 8 + 2 * 500_000_000  # a bucket of one backward pass
    fsdp2 = memory.optimizer_state(run_of("ultrachat", "engine={name: fsdp2}"), 8)
    assert fsdp2 == {"weights": 4 * p / 8, "gradients": 4 * p / 8, "optimizer": 8 * p / 8}


def test_a_model_that_a_stage_will_make_has_its_sizes():
    run = run_of("quickstart", "root=nowhere")
    assert run.student.hidden_size == 24 and run.student.head_rows == 1200 and run.student.num_layers == 2
    assert {role: one.shape.hidden_size for role, one in run.frozen.items()} == {
        "student_raw": 24,
        "teacher": 96,
        "teacher_raw": 96,
    }
    assert run_of("ultrachat", "root=nowhere").frozen["teacher"].shape.num_parameters == 7_615_616_512
