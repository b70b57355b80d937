"""One teacher in several processes: transformers splits each model over them; the first leads, the others are workers.

    leader                                     worker
    starts it, tells it the Job  ------------> stdin
                                 <------------ "here" in a store on the loopback interface
    begin                        ------------> both join a torch.distributed group of their own, and load
                                 <------------ "loaded"
    a Score, before each forward ------------> stdin
    its part of the forward      <===========> its part of the forward
                                 <------------ a pulse, now and then, in a pipe

The leader alone speaks to students. Nobody waits for the next batch inside a collective, so an idle group needs no
timeout. A group lives and dies as one: when a worker ends, falls silent, or does not finish a forward, the leader says
so and ends at once, and a worker ends when its stdin does. Whoever supervises the leader starts all of it again.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import TCPStore

from deltakd.base.errors import EXIT_USER_ERROR
from deltakd.base.processes import use_threads
from deltakd.base.ranks import forget_placement
from deltakd.base.supervisor import PULSE, pulse_from_environment
from deltakd.models.forward import Batch, Layout, supervised_hidden
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings
from deltakd.teacher.messages import Score, decode, encode
from deltakd.teacher.references import batch_bytes
from deltakd.teacher.server import read_batch

LOOPBACK = "127.0.0.1"
LOOK_S = 0.2
REASON_S = 10.0  # how long a failed forward waits for the reason to be said


@dataclass(frozen=True)
class Job:
    """What every process of a group must know; it travels as JSON."""

    models: Mapping[str, Any]  # the recipe's, as ModelsSettings reads them
    weights: Mapping[str, tuple[str, str]]  # role -> where the recipe names it, and its folder; equal ones name one
    layout: Layout
    devices: list[str]  # one for each process, the leader's first
    heartbeat_s: float
    start_s: float


class ShardGroup:
    """The leader's end of a group: starts the workers, and has them run each forward with it; use with `with`."""

    def __init__(self, job: Job, name: str, silent_s: float, answer_s: float) -> None:
        """`name` is the teacher's, for sentences. The process ends with exit code 1 when a worker has shown no pulse
        for twice `silent_s`, or when a forward lasts longer than `answer_s`."""
        self._job, self._name, self._patience_s, self._answer_s = job, name, 2 * silent_s, answer_s
        self._since: float | None = None  # when the forward under way began
        self._closing = threading.Event()
        self.workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "ShardGroup":
        job, size = self._job, len(self._job.devices)
        forget_placement(os.environ)  # a launcher's, which workers would take for theirs
        with socket.socket() as listener:  # where this machine's processes alone can reach it, on a port that is free
            listener.bind((LOOPBACK, 0))
            listener.listen()
            port = listener.getsockname()[1]
            patience = timedelta(seconds=job.start_s)
            self._store = TCPStore(LOOPBACK, port, size, True, patience, False, master_listen_fd=listener.detach())
        pulses = [self._start(rank, port) for rank in range(1, size)]
        self._watcher = threading.Thread(target=self._watch, args=(pulses,), name="shards", daemon=True)
        self._watcher.start()
        self._await("here")
        self._store.set("begin", "1")
        _join(job, 0, self._store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        for worker in self.workers:  # they keep nothing that is worth a wait; the supervisor takes a long one for stuck
            worker.kill()
        for worker in self.workers:
            worker.wait()
            assert worker.stdin is not None
            with suppress(OSError):  # what was written when it died
                worker.stdin.close()
        self._watcher.join()
        torch.distributed.destroy_process_group()

    def load(self) -> dict[str, Any]:
        """Load this process's part of every model, by role, and wait until the workers have loaded theirs."""
        models = _load(self._job, 0)
        self._await("loaded")
        return models

    def others(self) -> list[tuple[int, str]]:
        """Return pid and device of each worker."""
        return list(zip([worker.pid for worker in self.workers], self._job.devices[1:], strict=True))

    def forward(self, role: str, batch: Batch, run: Callable[[], Tensor]) -> Tensor:
        """Have the workers run a model's forward over a batch while `run` does it here; returns what `run` does."""
        message = encode(Score(0, role, 0, 0.0, *batch_bytes(batch), b""))
        self._since = time.monotonic()
        try:
            for worker in self.workers:
                assert worker.stdin is not None
                _write(worker.stdin, message)
            hidden = run()
            if hidden.is_cuda:  # a kernel that waits for a worker's is still this forward
                torch.cuda.synchronize(hidden.device)
        except (RuntimeError, OSError):
            # Most likely a worker is gone: the watcher is about to say which, and to end this process.
            self._closing.wait(REASON_S)
            raise
        self._since = None
        return hidden

    def _start(self, rank: int, port: int) -> int:
        """Start a worker; returns the reading end of its pulse."""
        reading, writing = os.pipe()
        worker = subprocess.Popen(
            [sys.executable, "-m", "deltakd", "shard"],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            env={**os.environ, PULSE: str(writing)},
        )
        os.close(writing)
        self.workers.append(worker)
        assert worker.stdin is not None
        _write(worker.stdin, json.dumps({"job": asdict(self._job), "rank": rank, "port": port}).encode())
        return reading

    def _await(self, word: str) -> None:
        try:
            self._store.wait([f"{word}/{rank}" for rank in range(1, len(self._job.devices))])
        except torch.distributed.DistStoreError:
            self._end(f"its workers have not said {word!r} for {self._job.start_s:g} s (teachers.start_s)")

    def _watch(self, pulses: list[int]) -> None:
        """End this process when a worker is gone or silent, or a forward does not end; live until all have left."""
        ranks = {pulse: rank for rank, pulse in enumerate(pulses, start=1)}
        heard: dict[int, float | None] = dict.fromkeys(pulses)
        while heard:
            now = time.monotonic()  # before looking, so that nobody seems late because this process was stopped
            for pulse in select.select(list(heard), [], [], LOOK_S)[0]:
                if os.read(pulse, 4096):
                    heard[pulse] = now
                    continue
                del heard[pulse]
                os.close(pulse)
                self._lose(ranks[pulse])
            for pulse, last in heard.items():
                if last is not None and now - last > self._patience_s:
                    worker = self.workers[ranks[pulse] - 1]
                    self._end(f"its worker {ranks[pulse]} (process {worker.pid}) was stuck for {self._patience_s:g} s")
            if (since := self._since) is not None and now - since > self._answer_s:
                self._end(f"a forward has lasted more than {self._answer_s:g} s (teachers.answer_s)")

    def _lose(self, rank: int) -> None:
        if self._closing.is_set():
            return
        worker = self.workers[rank - 1]
        with suppress(subprocess.TimeoutExpired):
            if worker.wait(REASON_S) == EXIT_USER_ERROR:  # it has said why, and would say it again
                self._end(None, EXIT_USER_ERROR)
        self._end(f"its worker {rank} (process {worker.pid}) ended with exit code {worker.returncode}")

    def _end(self, why: str | None, code: int = 1) -> None:
        """End the group: nothing is left to be done together, and the main thread may be stuck in a collective."""
        if self._closing.is_set():
            return
        if why is not None:
            print(f"teacher {self._name}: {why}, and a part of its models with it", file=sys.stderr, flush=True)
        for worker in self.workers:
            worker.kill()
        os._exit(code)


def serve_shard(stream: IO[bytes]) -> None:
    """Live a worker's life: join the leader's group, load a part of its models, and run its forwards until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the leader, which takes its leave of the students
    use_threads()
    if (first := _read(stream)) is None:
        return
    told = json.loads(first)
    job, rank = Job(**told["job"]), int(told["rank"])
    threading.Thread(target=_beat, args=(pulse_from_environment(), job.heartbeat_s), daemon=True).start()
    store = TCPStore(LOOPBACK, told["port"], len(job.devices), False, timedelta(seconds=job.start_s))
    store.set(f"here/{rank}", "1")
    store.wait(["begin"])
    _join(job, rank, store)
    models = _load(job, rank)
    for model in models.values():
        model.set_output_embeddings(None)  # payloads are formed by the leader; tied to the embedding, it stays there
    store.set(f"loaded/{rank}", "1")
    while (message := _read(stream)) is not None:
        score = decode(message)
        assert isinstance(score, Score)  # the leader sends nothing else
        model = models[score.model]
        batch = read_batch(score, len(model.get_input_embeddings().weight), job.devices[rank])
        with torch.inference_mode():
            supervised_hidden(model, batch, job.layout)
    torch.distributed.destroy_process_group()


def _join(job: Job, rank: int, store: TCPStore) -> None:
    """Join the group's own process group, and tell transformers this process's device in the way that it asks for."""
    device = torch.device(job.devices[rank])
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    for library in ("GLOO", "NCCL"):  # nothing of this leaves the machine
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    # nccl wants a GPU for each process; beside a student the whole group is on one.
    backend = "nccl" if device.type == "cuda" and len(set(job.devices)) == len(job.devices) else "gloo"
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=len(job.devices),
        timeout=timedelta(seconds=job.start_s),
        device_id=device if backend == "nccl" else None,
    )


def _load(job: Job, rank: int) -> dict[str, Any]:
    """Load one process's part of each model; all processes of a group load in one order."""
    settings = ModelsSettings.model_validate(job.models)
    loaded: dict[str, Any] = {}
    for where, folder in job.weights.values():
        if folder not in loaded:
            model = load_model(where, Path(folder), settings, num_shards=len(job.devices))
            loaded[folder] = model.requires_grad_(False).to(job.devices[rank])
    return {role: loaded[folder] for role, (_, folder) in job.weights.items()}


def _beat(pulse: Callable[[], None], every_s: float) -> None:
    while True:
        pulse()
        time.sleep(every_s)


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """Read what `_write` has written; None at the stream's end, also in the middle of a message."""
    size = stream.read(8)
    message = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    return message if len(size) == 8 and len(message) == int.from_bytes(size, "little") else None
