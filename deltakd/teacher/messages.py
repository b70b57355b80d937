"""The control messages between a student rank and a teacher rank: typed msgpack, never pickle.

    student                              teacher
    Hello            ------------->
                     <-------------      Welcome | Refused
    Score            ------------->
                     <-------------      Scored | Failed
    Bye              ------------->

Messages carry token ids and slot numbers; payloads travel through the arena. Arrays are raw little-endian int64 bytes.
"""

import hashlib

import msgspec

from deltakd.base.errors import TeacherError

PROTOCOL = 1
MAX_MESSAGE_BYTES = 64 * 2**20


class Hello(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A student rank says what it expects; a teacher that differs in any of it refuses."""

    protocol: int
    launch: str
    student_rank: int
    models: dict[str, str]  # model -> identity of its weights
    tokenizer: str
    kind: str
    dtype: str
    layout: str
    vocab_size: int
    arena: str  # file name in the scratch folder
    slot_bytes: int
    num_slots: int


class Welcome(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A teacher rank agrees with everything in the Hello."""

    teacher: int
    pid: int


class Refused(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A teacher rank does not serve this student, and why, with both values."""

    reason: str


class Score(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Ask one frozen model about the supervised positions of one packed batch."""

    request: int
    model: str
    slot: int
    tokens: bytes
    starts: bytes
    supervised: bytes
    digest: bytes


class Scored(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The payload lies in the slot, which belongs to the student again."""

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


class Bye(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A student rank is done; a teacher whose students have all left ends."""

    student_rank: int


Message = Hello | Welcome | Refused | Score | Scored | Failed | Bye

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
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise TeacherError(f"teacher service: not a message ({error}). Refused.") from error


def batch_digest(tokens: bytes, starts: bytes, supervised: bytes) -> bytes:
    """Hash what a request asks about; both ends compute it, so an answer about other tokens is found out."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (tokens, starts, supervised):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
