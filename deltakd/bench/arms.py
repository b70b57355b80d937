"""What `bench step` compares: arms, each a training with settings of its own. Imports no torch."""

KL = ["objective.target={name: teacher}"]
# What differs from the recipe; of those with a cache it is written first, and that is told apart.
ARMS: dict[str, tuple[str, list[str]]] = {
    "sft": ("SFT alone", ["objective.sft_weight=1.0"]),
    "cache_target": ("delta, target from a cache", ["references={from: cache, payload: target}"]),
    "cache_top_k": ("delta, top k from a cache", ["references={from: cache, payload: top_k}"]),
    "cache_hidden": ("delta, hidden states from a cache", ["references={from: cache, payload: hidden}"]),
    "service": ("delta, from a teacher process", ["references.payload=hidden"]),
    "in_process": ("delta, models beside the student", ["references={from: in_process, payload: hidden}"]),
    "one_by_one": ("delta, one model loaded after the other", ["references={from: in_process, payload: hidden}"]),
    "kl": ("forward KL, teacher beside the student", [*KL, "references={from: in_process}"]),
    "trl": ("forward KL by TRL's GKDTrainer, batch 8", [*KL]),
}
