"""Where student ranks listen: a socket file on their node, and a TCP port with keys for teachers from elsewhere.

    /dev/shm/deltakd-<launch>/student-<rank>.sock      teachers of the node
    RUN/service/student-<rank>.json                    the others: endpoint and keys, readable by the run's user alone

Keys are ZeroMQ CURVE's, made anew for every student rank and launch. Without them nobody gets a word out of the port.
"""

import ipaddress
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import zmq
from zmq.auth.thread import ThreadAuthenticator

from deltakd.base.errors import RunError

DOMAIN = "deltakd"  # of ZeroMQ's authentication
LINGER_MS = 1000  # that a closed socket goes on trying to deliver what it holds


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one student rank listens, and with which keys it is spoken to; a local one needs none."""

    endpoint: str
    rank: int
    num_students: int
    launch: str
    server_key: str = ""
    public_key: str = ""
    secret_key: str = ""


@dataclass(frozen=True)
class Keys:
    """A student rank's own key pair, and the one that its teachers from elsewhere use."""

    public: bytes
    secret: bytes
    teacher_public: bytes
    teacher_secret: bytes


def make_keys() -> Keys:
    """Draw new keys."""
    return Keys(*zmq.curve_keypair(), *zmq.curve_keypair())


def new_context() -> "zmq.Context[zmq.Socket[bytes]]":
    """Make the context of one thread's sockets, which all give up at last once they are closed.

    That is set here and not at a socket, since a bound one hands on to every connection what was set before it was
    bound: by ZeroMQ's default a connection whose peer dies while we close would keep `term` waiting for ever.
    """
    context = zmq.Context()
    context.linger = LINGER_MS
    return context


def local_socket(scratch: Path, rank: int) -> Path:
    """Return where a student rank listens on its node."""
    return scratch / f"student-{rank}.sock"


def local_addresses(scratch: Path, launch: str, num_students: int) -> list[Address]:
    """Return the student ranks that listen on this node now."""
    found = {int(path.stem.partition("-")[2]): path for path in scratch.glob("student-*.sock")}
    return [Address(f"ipc://{path}", rank, num_students, launch) for rank, path in sorted(found.items())]


def remote_addresses(folder: Path) -> list[Address]:
    """Return the student ranks whose addresses lie in a run's `service` folder, the last written first.

    Where a launch was killed its addresses stay until the next one has written its own.
    """
    found = []
    for path in folder.glob("student-*.json"):
        try:
            found.append((path.stat().st_mtime_ns, msgspec.json.decode(path.read_bytes(), type=Address)))
        except FileNotFoundError:  # removed at this moment
            continue
        except msgspec.MsgspecError as error:
            raise RunError(f"{path}: not an address ({error}). Start the run again.") from error
    return [address for _, address in sorted(found, key=lambda pair: -pair[0])]


def write_address(folder: Path, address: Address) -> Path:
    """Write an address that this user alone can read, whole or not at all."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"student-{address.rank}.json"
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(address))
    part.replace(path)
    return path


def _addresses() -> dict[str, list[str]]:
    """Return this host's IPv4 addresses by network interface."""
    interfaces = psutil.net_if_addrs().items()
    return {name: [one.address for one in entries if one.family == socket.AF_INET] for name, entries in interfaces}


def own_host() -> str:
    """Return this host's first IPv4 address that others may reach, or the loopback one."""
    addresses = [one for entries in _addresses().values() for one in entries]
    return next((one for one in addresses if not ipaddress.ip_address(one).is_loopback), "127.0.0.1")


def interface_address(host: str | None) -> str | None:
    """Return the address of a network interface that is named instead of one, so that all nodes share a recipe."""
    addresses = _addresses().get(host or "")
    return addresses[0] if addresses else host


def listen(
    context: "zmq.Context[zmq.Socket[bytes]]", host: str, keys: Keys
) -> tuple["zmq.Socket[bytes]", int, ThreadAuthenticator]:
    """Open a port for those who have the keys; returns the socket, its port and the guard, which must be stopped.

    Raises RunError if the host is none of this machine's.
    """
    guard = ThreadAuthenticator(context)
    guard.start()
    guard.configure_curve_callback(DOMAIN, credentials_provider=_Known(keys.teacher_public))
    router = context.socket(zmq.ROUTER)
    router.zap_domain = DOMAIN.encode()
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = keys.public, keys.secret
    try:
        port = router.bind_to_random_port(f"tcp://{host}")
    except zmq.ZMQError as error:
        router.close(linger=0)
        guard.stop()
        raise RunError(
            f"teachers.host: {host} cannot be listened on ({error}). Write an address or a network interface of "
            "this machine, or null."
        ) from error
    return router, port, guard


@dataclass(frozen=True)
class _Known:
    """Lets in whoever holds the teachers' key."""

    public: bytes

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self.public


def new_identity() -> bytes:
    """Draw the name of a socket; ZeroMQ keeps those that begin with a zero for itself."""
    return b"t" + secrets.token_bytes(15)


def connect(context: "zmq.Context[zmq.Socket[bytes]]", address: Address, identity: bytes) -> "zmq.Socket[bytes]":
    """Open a socket to a student rank."""
    dealer = context.socket(zmq.DEALER)
    dealer.identity = identity
    if address.server_key:
        dealer.curve_serverkey = address.server_key.encode()
        dealer.curve_publickey, dealer.curve_secretkey = address.public_key.encode(), address.secret_key.encode()
        dealer.heartbeat_ivl, dealer.heartbeat_timeout = 1000, 10_000  # milliseconds; a host that fell silent
    dealer.connect(address.endpoint)
    return dealer


def remove_address(path: Path) -> None:
    """Remove what `write_address` wrote, and its folder when it is empty."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another rank's address is still there, or it was faster
        path.parent.rmdir()
