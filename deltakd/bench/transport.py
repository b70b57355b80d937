"""`deltakd bench transport`: from one process to another, by shared memory and by what others use, beside memcpy.

A payload is asked for, put where the asker can read it, and said to be there; that is timed, at the asker, and divided
by the time of one memcpy of the same bytes, taken in turns in the same process. Then a round trip without payload:
what control costs by itself, and through a whole teacher rank.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import zmq
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deltakd.base.machine import machine_facts
from deltakd.teacher.addresses import new_context
from deltakd.teacher.arena import Arena, slot_bytes_for
from deltakd.teacher.messages import Score, Scored, decode, encode

MIB = 2**20
WAYS = {
    "arena": "shared memory and a ZeroMQ message: what teachers of a node do",
    "keys": "ZeroMQ over TCP with CURVE keys, the payload as a frame: what teachers of other nodes do",
    "frames": "the same without keys",
    "tcp": "a plain TCP socket into a buffer that is there already",
    "queue": "a torch.multiprocessing queue",
    "pickle": "pickle over ZeroMQ",
}
CONTROL_PAIRS = 9
Ask = Callable[[], Tensor]


def bench(sizes: Sequence[int], repeats: int, out: Path) -> None:
    """Measure every way at every size in MiB, print the table and write JSON."""
    torch.set_num_threads(1)
    results = [_measure(way, size, repeats) for size in sizes for way in WAYS]
    # Where the kernel puts two processes decides more than anything else: several pairs of them.
    control = sorted(_measure_control(max(200, repeats)) for _ in range(CONTROL_PAIRS))
    report = {"machine": machine_facts(), "results": results, "control_ms": control}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(
        "way", *(f"{size} MiB" for size in sizes), title="memcpy's time / the way's time: 1 is as fast as memcpy"
    )
    for way in WAYS:
        table.add_row(way, *(f"{r['of_memcpy']:.2f}" for r in results if r["way"] == way))
    Console().print(table)
    print(f"control, a round trip without payload: {median(control):.3f} ms, {control[0]:.3f} to {control[-1]:.3f}")
    print(f"{out}: written")


def _measure(way: str, size: int, repeats: int) -> dict[str, Any]:
    num_bytes = size * MIB
    source, place = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    own, copies = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, _way(way, Path(folder), num_bytes) as ask:
        for index in range(repeats + 2):
            started = time.perf_counter()
            data = ask()
            own.append(time.perf_counter() - started)
            assert len(data) == num_bytes and data[0] == data[-1] == index % 251, way
            started = time.perf_counter()
            place.copy_(source)
            copies.append(time.perf_counter() - started)
    ratios = [theirs / mine for mine, theirs in zip(own[2:], copies[2:], strict=True)]  # two to warm up
    return {"way": way, "mib": size, "seconds": own[2:], "memcpy_seconds": copies[2:], "of_memcpy": median(ratios)}


@contextmanager
def _way(way: str, folder: Path, num_bytes: int) -> Iterator[Ask]:
    """Start the process at the other end; yields what asks it for the next payload."""
    if way == "queue":
        with _queue(num_bytes) as ask:
            yield ask
        return
    command = [sys.executable, "-m", "deltakd.bench.transport", way, str(folder), str(num_bytes)]
    makers = {"arena": _ask_arena, "keys": _ask_keys, "frames": _ask_frames, "pickle": _ask_pickle, "tcp": _ask_tcp}
    with makers[way](folder, num_bytes) as ask:
        child = subprocess.Popen(command)
        try:
            yield ask
        finally:
            child.kill()
            child.wait()


def _endpoint(way: str, folder: Path) -> str:
    return f"ipc://{folder}/{way}.sock"


@contextmanager
def _router(endpoint: str, secret: bytes | None = None) -> Iterator["zmq.Socket[bytes]"]:
    context = new_context()
    router = context.socket(zmq.ROUTER)
    if secret is not None:
        router.curve_server, router.curve_secretkey = True, secret
    router.bind(endpoint)
    yield router
    router.close(linger=0)
    context.term()


def _asker(router: "zmq.Socket[bytes]", read: Callable[[list[Any]], Tensor]) -> Ask:
    peer: list[bytes] = []
    score = encode(Score(1, "teacher", 0, 0.5, b"\0" * 8192, b"\0" * 64, b"\0" * 8192, b"\0" * 16))

    def ask() -> Tensor:
        if not peer:
            peer.append(router.recv_multipart()[0])  # it has come
        router.send_multipart([peer[0], score])
        return read(router.recv_multipart(copy=False))

    return ask


@contextmanager
def _ask_arena(folder: Path, num_bytes: int) -> Iterator[Ask]:
    with (
        Arena(folder / "arena", slot_bytes_for(num_bytes), 1, owner=True) as arena,
        _router(_endpoint("arena", folder)) as r,
    ):

        def read(frames: list[Any]) -> Tensor:
            message = decode(frames[1].buffer)
            assert isinstance(message, Scored)
            return arena.slot(message.slot, message.num_bytes)

        yield _asker(r, read)


def _ask_keys(folder: Path, num_bytes: int) -> AbstractContextManager[Ask]:
    public, secret = zmq.curve_keypair()
    (folder / "key").write_bytes(public)
    return _ask_frames(folder, num_bytes, secret)


@contextmanager
def _ask_frames(folder: Path, num_bytes: int, secret: bytes | None = None) -> Iterator[Ask]:
    place = torch.ones(num_bytes, dtype=torch.uint8)
    with _router("tcp://127.0.0.1:*", secret) as router:
        (folder / "port").write_text(str(router.get_string(zmq.LAST_ENDPOINT)).rstrip("\0"))

        def read(frames: list[Any]) -> Tensor:
            return place.copy_(torch.frombuffer(frames[2].buffer, dtype=torch.uint8))

        yield _asker(router, read)


@contextmanager
def _ask_pickle(folder: Path, num_bytes: int) -> Iterator[Ask]:
    import pickle  # of our own child's bytes, to be measured: nothing else here ever unpickles

    with _router(_endpoint("pickle", folder)) as router:
        yield _asker(router, lambda frames: pickle.loads(frames[1].bytes))


@contextmanager
def _ask_tcp(folder: Path, num_bytes: int) -> Iterator[Ask]:
    place = torch.ones(num_bytes, dtype=torch.uint8)
    view = place.numpy().data
    with socket.create_server(("127.0.0.1", 0)) as server:
        (folder / "port").write_text(str(server.getsockname()[1]))
        connection: list[socket.socket] = []

        def ask() -> Tensor:
            if not connection:
                connection.append(server.accept()[0])
            connection[0].sendall(b"?")
            done = 0
            while done < num_bytes:
                done += connection[0].recv_into(view[done:])
            return place

        yield ask
        for one in connection:
            one.close()


@contextmanager
def _queue(num_bytes: int) -> Iterator[Ask]:
    from torch import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    asked, answered = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=_answer_queue, args=(asked, answered, num_bytes), daemon=True)
    child.start()

    def ask() -> Tensor:
        asked.put(1)
        data: Tensor = answered.get()
        return data

    try:
        yield ask
    finally:
        asked.put(None)
        child.join(20)


def _answer_queue(asked: Any, answered: Any, num_bytes: int) -> None:
    torch.set_num_threads(1)
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    number = 0
    while asked.get() is not None:
        data[0] = data[-1] = number % 251
        answered.put(data.clone())  # as a payload is new every time; the queue moves it into shared memory
        number += 1


def _answer(way: str, folder: Path, num_bytes: int) -> None:
    """Live at the other end: put a new payload where the asker reads it, for every request."""
    torch.set_num_threads(1)
    data = torch.zeros(num_bytes, dtype=torch.uint8)

    def renew(number: int) -> Tensor:
        data[0] = data[-1] = number % 251
        return data

    if way == "tcp":
        with socket.create_connection(("127.0.0.1", int((folder / "port").read_text()))) as connection:
            number = 0
            while connection.recv(1):
                connection.sendall(renew(number).numpy().data)
                number += 1
        return
    context = new_context()
    dealer = context.socket(zmq.DEALER)
    if way == "keys":
        dealer.curve_serverkey = (folder / "key").read_bytes()
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    over_tcp = way in ("keys", "frames")
    dealer.connect((folder / "port").read_text() if over_tcp else _endpoint(way, folder))
    dealer.send(b"here")
    arena = Arena(folder / "arena", slot_bytes_for(num_bytes), 1, owner=False) if way == "arena" else None
    number = 0
    while True:
        asked = decode(dealer.recv())
        assert isinstance(asked, Score)
        renew(number)
        number += 1
        scored = encode(Scored(asked.request, asked.slot, num_bytes, asked.digest, 0.0, 0.0))
        if arena is not None:
            arena.slot(asked.slot, num_bytes).copy_(data)
            dealer.send(scored)
        elif over_tcp:
            dealer.send_multipart([scored, data.numpy().data], copy=False)
        else:
            import pickle

            dealer.send(pickle.dumps(data, protocol=5))


def _measure_control(repeats: int) -> float:
    """Return the median milliseconds of a round trip of control messages with one page of payload."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, _way("arena", Path(folder), 4096) as ask:
        spent = []
        for _ in range(repeats):
            started = time.perf_counter()
            ask()
            spent.append(time.perf_counter() - started)
    return 1000 * median(spent[2:])


if __name__ == "__main__":
    _answer(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
