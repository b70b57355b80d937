"""Both ends of the service in one process, for tests: real sockets and slots, and a teacher by hand."""

import os
import threading
from contextlib import contextmanager

import torch

from deltakd.base.errors import TeacherError
from deltakd.data.examples import Example
from deltakd.data.packing import pack
from deltakd.losses import objective
from deltakd.models.settings import ModelsSettings, WeightsSettings
from deltakd.teacher.addresses import connect, local_addresses, new_context, remote_addresses
from deltakd.teacher.client import ServiceReferences, ServiceSettings, make_arena
from deltakd.teacher.members import Front, Members
from deltakd.teacher.messages import PROTOCOL, Join, Terms, Welcome
from deltakd.teacher.payloads import FrozenFacts, FrozenModels, PayloadSpec
from deltakd.teacher.server import Offer, TeacherServer

FLOAT32 = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
SPEC = PayloadSpec("hidden", "float32", "packed", 300)
DELTA = {"target": {"name": "delta", "alpha": 0.5}}
SETTINGS = ServiceSettings(look_ahead=2, start_s=20, answer_s=20, give_up_s=20, max_tokens=64)


def batches(count: int, alpha: float = 0.5):
    generator = torch.Generator().manual_seed(2)

    def example(length: int) -> Example:
        tokens = torch.randint(0, 300, (length,), generator=generator).int().numpy()
        return Example(tokens, (torch.arange(length) > length // 2).numpy())

    return [(pack([example(5 + i), example(9)]), alpha) for i in range(count)]


def terms(spec=SPEC, launch="test", tokenizer="fingerprint", wanted=""):
    return Terms(PROTOCOL, launch, tokenizer, spec.words, wanted, spec.layout, spec.vocab_size)


@contextmanager
def serving(folder, models, spec=SPEC, name="0", network=None, **changes):
    """A teacher rank in a thread of this process: its sockets and its arena are the real ones."""
    frozen = FrozenModels(models, spec, objective(DELTA), seed=7)
    offer = Offer(frozen, dict.fromkeys(models, "w1"), changes.pop("terms", terms(spec)), name)
    find = (lambda: remote_addresses(network)) if network else (lambda: local_addresses(folder, "test", 1))
    with TeacherServer(offer, find, None if network else folder, heartbeat_s=0.05, **changes) as server:
        server.error = None

        def live():
            try:
                server.serve(60.0, lambda: None)
            except TeacherError as error:
                server.error = error

        thread = server.thread = threading.Thread(target=live, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


def widths(models):
    return {name: int(model.get_output_embeddings().weight.shape[1]) for name, model in models.items()}


@contextmanager
def listening(folder, names=("teacher",), spec=SPEC, silent_s=20.0, settings=SETTINGS, network=None, hidden=48):
    """A student rank's sockets and slots."""
    facts = {name: FrozenFacts("w1", hidden) for name in names}
    with make_arena(folder, 0, facts, spec, settings) as arena:
        welcome = Welcome(0, arena.path.name, arena.slot_bytes, arena.num_slots)
        front = Front(0, 1, 1, terms(spec), dict.fromkeys(names, "w1"), folder, welcome)
        with Members(front, silent_s, network, "127.0.0.1") as members:
            yield members, arena, facts


@contextmanager
def references(folder, names=("teacher",), spec=SPEC, settings=SETTINGS, heads=None, **changes):
    with listening(folder, names, spec, settings=settings, **changes) as (members, arena, facts):
        yield ServiceReferences(members, arena, facts, heads or {}, spec, settings)


def fall_silent(members, name="0"):
    """Let a teacher be as if nobody had heard it for a minute, however fast this machine is."""
    (member,) = [member for member in members.everyone() if member.join.name == name]
    member.heard -= 60


def join(**changes):
    told = {"terms": terms(), "models": {"teacher": "w1"}, "name": "0", "host": "h", "pid": os.getpid(), "log": "a log"}
    return Join(**(told | changes))


@contextmanager
def teacher_by_hand(folder, identity=b"by hand"):
    """A socket in a teacher's place, to say what no teacher of ours would."""
    context = new_context()
    (address,) = local_addresses(folder, "test", 1)
    dealer = connect(context, address, identity)
    dealer.rcvtimeo = 20_000
    try:
        yield dealer
    finally:
        dealer.close(linger=0)
        context.term()
