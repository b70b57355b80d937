"""A teacher in two processes says what one says: every payload, at every size, by models that are tied and untied."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from msgspec.structs import replace
from transformers import GPT2Config

from deltakd.base.errors import ModelError
from deltakd.models.load import load_model, refuse_unsplittable
from deltakd.models.new import write_new_model
from deltakd.models.settings import NewModelSettings
from deltakd.teacher.cache import cache_folder
from tests.run.running import wait_until
from tests.teacher.contract import FLOAT32, terms
from tests.teacher.leader import KINDS, payloads

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(lab, models):
    made = NewModelSettings(
        tokenizer=str(lab.folder / "tokenizer"),
        hidden_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=63,
        tie_embeddings=False,
        head_rows=301,
    )
    write_new_model(made, lab.folder / "odd")
    return models | {"odd": load_model("odd", lab.folder / "odd", FLOAT32)}


def lead(lab, *words):
    command = [sys.executable, str(REPOSITORY / "tests" / "teacher" / "leader.py"), str(lab.folder), *words]
    environment = lab.environment() | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def told(lab, models, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "told.pt"
    done = lead(lab, str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_payloads_of_a_teacher_in_two_processes_are_those_of_one(models, told, kind):
    """Documents of 5 to 10 tokens; one model has widths and a head that do not divide by 2."""
    for name, expected in payloads(models, kind).items():
        for mine, again, theirs in zip(told["payloads"][kind][name], told["again"][kind][name], expected, strict=True):
            for one, once_more, other in zip(mine, again, theirs, strict=True):
                assert one.equal(once_more), "split models are not equal to themselves"
                if one.is_floating_point():
                    # Two sums of half a row each instead of one, in float32, of logits up to 30.
                    assert one.isfinite().all() and (one - other).abs().max() < 1e-5 * max(1, other.abs().max())
                else:  # ids: of the most probable tokens, or drawn with the same seed
                    assert one.equal(other)


def test_what_takes_the_most_memory_is_cut_and_what_payloads_read_is_whole(models, told):
    for role, model in models.items():
        for part, mine in told["sizes"][role].items():
            whole = model.get_decoder().layers[0].get_submodule(part).weight
            assert 0 <= 2 * mine - whole.numel() <= max(whole.shape)  # half of it, a row more
        assert told["heads"][role].equal(model.get_output_embeddings().weight)


def test_it_listens_on_this_machine_alone(told):
    assert told["listening"] and told["listening"] <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_a_cache_of_split_models_is_another(tmp_path):
    folders = [cache_folder(tmp_path, given, {})[0] for given in (terms(), replace(terms(), tensor_parallel=2))]
    assert folders[0] != folders[1]


def test_models_that_cannot_be_split_are_refused(lab, tmp_path):
    with pytest.raises(
        ModelError, match=r"4 attention heads and 2 key-value heads of .* over 4 processes. Write .* 1, 2"
    ):
        refuse_unsplittable("models.teacher.weights", lab.folder / "teacher", 4, False)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"is a gpt2, and transformers has no plan .* Write teachers.tensor_parallel: 1"
    ):
        refuse_unsplittable("models.teacher.weights", tmp_path, 2, False)


def test_a_forward_that_does_not_end_ends_the_leader_and_its_worker(lab, models):
    """A worker that lives, and shows a pulse, may still be stuck; here the leader itself is."""
    done = lead(lab)
    assert done.returncode == 1 and "teacher 0: a forward has lasted more than 1 s" in done.stderr, done.stderr
    wait_until(lambda: not psutil.pid_exists(int(done.stdout.split()[-1])), "the worker's end")
