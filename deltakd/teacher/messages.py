"""The control messages between a student rank and a teacher rank: typed msgpack, never pickle.

    student                              teacher
                     <-------------      Join        a teacher comes, at any time
    Welcome | Refused ------------>
    Score            ------------->
                     <-------------      Scored | Failed
                     <-------------      Alive       every heartbeat, whatever it computes
    Bye              ------------->
                     <-------------      Leave       it goes in good order; others take its requests

Messages carry token ids and slot numbers. Payloads travel through the arena; a teacher on another node sends the same
bytes as a second frame behind its Scored. Arrays are raw little-endian int64 bytes.
"""

import hashlib

import msgspec

from deltakd.base.errors import TeacherError

PROTOCOL = 3
MAX_MESSAGE_BYTES = 64 * 2**20


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What both ends must mean alike; a teacher that differs in any of it is refused, with both values."""

    protocol: int
    launch: str
    tokenizer: str
    payload: str  # kind, precision, sizes
    objective: str  # of a payload that fixes the target; empty for one that keeps the models apart
    layout: str
    vocab_size: int
    tensor_parallel: int = 1  # sums in another order are other numbers


class Join(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A teacher rank offers its models."""

    terms: Terms
    models: dict[str, str]  # model -> identity of its weights
    name: str
    host: str
    pid: int
    log: str


class Welcome(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A student rank agrees with everything in the Join."""

    student_rank: int
    arena: str  # file name in the scratch folder of the node
    slot_bytes: int
    num_slots: int


class Refused(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A student rank does not take this teacher, and why, with both values."""

    reason: str


class Score(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Ask one frozen model, or all of them for the `target`, about the supervised positions of one packed batch."""

    request: int
    model: str
    slot: int
    alpha: float  # of the step; read by payloads that fix the target
    tokens: bytes
    starts: bytes
    supervised: bytes
    digest: bytes


class Scored(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The payload lies in the slot, which belongs to the student again, or in the next frame."""

    request: int
    slot: int
    num_bytes: int
    digest: bytes  # of the request's tokens, as the teacher saw them
    queue_s: float
    forward_s: float


class Failed(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The teacher cannot answer this request; nothing usable lies in the slot."""

    request: int
    slot: int
    reason: str


class Alive(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A teacher's heart beats, from a thread of its own; `member` is the identity of its other socket."""

    member: bytes


class Leave(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A teacher goes; it answers nothing that is still open."""


class Bye(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A student rank is done; a teacher whose students have all left ends."""

    student_rank: int


Message = Join | Welcome | Refused | Score | Scored | Failed | Alive | Leave | Bye

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    return _ENCODER.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Return the message in some bytes; raises TeacherError if they are not exactly one."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise TeacherError(f"teacher service: a message of {len(data):,} bytes exceeds {MAX_MESSAGE_BYTES:,}. Refused.")
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:  # ValueError: text not in UTF-8
        raise TeacherError(f"teacher service: not a message ({error}). Refused.") from error


def batch_digest(tokens: bytes, starts: bytes, supervised: bytes) -> bytes:
    """Hash what a request asks about; both ends compute it, so an answer about other tokens is found out."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (tokens, starts, supervised):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def ask_again(score: Score, request: int, slot: int) -> Score:
    """Return a request under another number, for another slot."""
    return msgspec.structs.replace(score, request=request, slot=slot)


def differences(theirs: Terms, ours: Terms) -> list[str]:
    """Name every term in which a teacher differs from its student, with both values."""
    fields = ((name, getattr(theirs, name), getattr(ours, name)) for name in Terms.__struct_fields__)
    return [f"{name}: {there} there, {here} here" for name, there, here in fields if there != here]
