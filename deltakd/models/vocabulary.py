"""One vocabulary for all models of a run (docs/objectives.md: vocabulary).

Models of one family pad their heads differently (Qwen2.5-7B has 152,064 rows, 1.5B has 151,936, the tokenizer knows
151,665 ids). Every model must speak the same tokenizer; the shared vocabulary is the smallest head; rows above it are
left out on every side before anything is normalised.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from deltakd.base.errors import ModelError


def fingerprint(tokenizer: Any) -> str:
    """Hash the id-to-token map and the special tokens: equal for two tokenizers that mean the same by every id."""
    text = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def refuse_foreign(where: str, tokenizer: Any, other: Any) -> None:
    """Raise ModelError with the first differing id and both tokens unless two tokenizers mean the same."""
    if fingerprint(tokenizer) == fingerprint(other):
        return
    ours, theirs = ({id_: token for token, id_ in one.get_vocab().items()} for one in (tokenizer, other))
    differing = sorted(id_ for id_ in ours.keys() | theirs.keys() if ours.get(id_) != theirs.get(id_))
    if differing:
        first = differing[0]
        what = f"id {first} is {ours.get(first)!r} for the student and {theirs.get(first)!r} here"
    else:
        special = sorted(set(tokenizer.all_special_tokens) ^ set(other.all_special_tokens))
        what = f"the special tokens differ ({', '.join(special)})"
    raise ModelError(f"{where}: another tokenizer than the student's: {what}. Write a model with the same tokenizer.")


def shared_vocabulary(head_rows: Mapping[str, int], num_tokens: int) -> int:
    """Return the size of the vocabulary that all heads hold: the smallest number of rows.

    Raises ModelError if a head has fewer rows than the tokenizer has tokens.
    """
    name, size = min(head_rows.items(), key=lambda item: item[1])
    if size < num_tokens:
        raise ModelError(
            f"models.{name}: its head has {size:,} rows, the tokenizer {num_tokens:,} tokens. "
            "Write a model whose head covers the tokenizer."
        )
    return size
