"""What a recipe says about the frozen models' side: what they send, who serves them, how patient everyone is."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class ReferencesSettings(Settings):
    """How the frozen models' words reach the loss."""

    source: Literal["service", "in_process", "cache"] = Field(
        "service",
        alias="from",
        description="service: teacher ranks in processes of their own. in_process: loaded beside the student. "
        "cache: what `deltakd cache` wrote before; no teacher is needed.",
    )
    payload: Literal["auto", "hidden", "logits", "target", "top_k", "sampled"] = Field(
        "auto",
        description="hidden: last hidden states, the student owns the frozen heads. logits: each model's "
        "vocabulary. target: the one target's. top_k, sampled: estimates of it. auto: hidden or target, by size.",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Precision of the payload.")
    top_k: int = Field(64, gt=0, description="How many of the target's tokens top_k sends.")
    tail: bool = Field(True, description="top_k: add the mass of all other tokens; false: renormalise without them.")
    samples: int = Field(64, gt=0, description="How many draws from the target sampled sends for each token.")


class TeachersSettings(Settings):
    """The teacher ranks, and how students deal with them."""

    per_node: int = Field(1, gt=0, description="How many processes of a node serve; the others train.")
    tensor_parallel: int = Field(
        1,
        gt=0,
        description="Over how many of these processes, and their accelerators, each teacher's models are split.",
    )
    serves: list[list[str]] | None = Field(
        None, description="The models of each teacher of a node; null: all of them on every one."
    )
    look_ahead: int = Field(2, ge=0, description="Micro-batches requested beyond the one in training.")
    slots: int | None = Field(
        None,
        gt=0,
        description="Payloads that a student rank holds in shared memory at once; null: those of look_ahead + 2 "
        "micro-batches. Fewer take less memory, and requests wait for a free one.",
    )
    start_s: float = Field(600.0, gt=0, description="How long a teacher may take to load its models and join.")
    answer_s: float = Field(300.0, gt=0, description="How long one answer may take before another teacher is asked.")
    heartbeat_s: float = Field(1.0, gt=0, description="How often a teacher says that it lives.")
    silent_s: float = Field(10.0, gt=0, description="After how long a silent teacher's requests go to others.")
    give_up_s: float = Field(300.0, gt=0, description="How long a run waits for a teacher before it stops.")
    restarts: int = Field(3, ge=0, description="How often each teacher rank is started again after it died.")
    network: bool = Field(True, description="Listen, with keys, for teachers of other nodes as well.")
    host: str | None = Field(
        None,
        description="The address or network interface (ib0) of this node that they reach; null: listen on all, name "
        "the first.",
    )
