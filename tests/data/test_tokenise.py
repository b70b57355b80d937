"""Every row is accounted for, and the cache is read exactly when its inputs are the same."""

import os
import shutil
import threading

import numpy as np
import pytest

from deltakd.base.errors import DataError
from deltakd.data.examples import drop_validation
from deltakd.data.settings import DataSettings, SourceSettings
from deltakd.data.tokenise import build_examples


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# As words, with five tokens of headers and ends and the question before the answer: 9, 16 and 19 tokens, the last 3, 10
# and 2 of them learnt.
SHORT = chat("soup", "gladly she")
LONG_ANSWER = chat("soup", "soup " * 9)
LONG_QUESTION = chat("soup " * 12, "soup")


def build(file, tokenizer, cache=None, **more):
    settings = DataSettings(train=SourceSettings(path=str(file)), **more)
    return build_examples(settings, settings.train, tokenizer, cache, progress=False)


def same(one, two) -> bool:
    return one.counts == two.counts and all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("tokens", "supervised", "starts", "lengths")
    )


def test_examples_stand_in_the_order_of_rows_and_counts_add_up(write, words):
    examples = build(write("a.jsonl", [SHORT, LONG_ANSWER, LONG_QUESTION]), words)
    assert examples.lengths.tolist() == [9, 16, 19]
    assert [int(example.supervised.sum()) for example in examples] == [3, 10, 2]
    assert examples.counts.rows == 3
    assert (examples.counts.tokens, examples.counts.supervised_tokens) == (44, 15)
    assert words.decode(examples[-1].tokens[examples[-1].supervised]) == "soup <|im_end|>"


def test_over_long_rows_are_dropped_or_cut_and_counted(write, words):
    file = write("a.jsonl", [SHORT, LONG_ANSWER, LONG_QUESTION])
    dropped = build(file, words, max_tokens=9)
    assert dropped.lengths.tolist() == [9] and dropped.counts.dropped_over_long == 2
    cut = build(file, words, max_tokens=9, over_long="truncate")
    assert cut.lengths.tolist() == [9, 9] and int(cut[1].supervised.sum()) == 3
    # Of the long question nothing that is learnt is left.
    assert (cut.counts.truncated, cut.counts.dropped_unsupervised, cut.counts.rows) == (2, 1, 3)


@pytest.mark.parametrize("over_long", ["drop", "truncate"])
def test_rows_of_which_nothing_is_left_to_learn_are_refused(write, words, over_long):
    file = write("a.jsonl", [LONG_QUESTION])
    with pytest.raises(DataError, match=r"nothing to learn from in 1 rows: .*Write a larger data.max_tokens"):
        build(file, words, max_tokens=10, over_long=over_long)


def test_a_bad_row_is_named_by_its_file_and_place(write, words):
    file = write("a.jsonl", [SHORT, {"messages": SHORT["messages"][:1]}])
    with pytest.raises(DataError, match=rf"^{file}:2: no assistant turn"):
        build(file, words)


def test_a_kept_set_is_read_back_as_it_was_without_its_rows(write, words, tmp_path):
    file, cache = write("a.jsonl", [SHORT, LONG_ANSWER]), tmp_path / "cache"
    first = build(file, words, cache)
    assert same(first, build(file, words))
    # Reading rows again would fail: nothing in the file is a row now, under the old name, size and time.
    stat = file.stat()
    file.write_bytes(b"\n" * stat.st_size)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = build(file, words, cache)
    assert same(first, second) and isinstance(second.tokens, np.memmap)


def test_a_change_of_rows_settings_or_tokenizer_is_never_answered_from_the_cache(write, words, byte_bpe, tmp_path):
    file, cache = write("a.jsonl", [SHORT, LONG_ANSWER]), tmp_path / "cache"
    build(file, words, cache)
    assert build(file, words, cache, max_tokens=10).counts.dropped_over_long == 1
    assert build(file, words, cache, max_tokens=10, over_long="truncate").counts.truncated == 1
    assert build(file, byte_bpe, cache).tokens.tolist() == build(file, byte_bpe).tokens.tolist()
    write("a.jsonl", [SHORT, LONG_ANSWER, LONG_QUESTION])
    assert len(build(file, words, cache)) == 3
    assert build(file, words, cache, layout="padded") is not None
    assert len(list(cache.iterdir())) == 5  # the layout decides nothing here


def test_processes_that_build_at_once_get_one_set_and_leave_nothing_else(write, words, tmp_path):
    file, cache = write("a.jsonl", [SHORT, LONG_ANSWER] * 50), tmp_path / "cache"
    gate, results = threading.Barrier(4), []

    def run() -> None:
        gate.wait()
        results.append(build(file, words, cache))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(same(results[0], other) for other in results)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_a_damaged_cache_is_refused_with_the_folder_to_delete(write, words, tmp_path, fault):
    file, cache = write("a.jsonl", [SHORT, LONG_ANSWER]), tmp_path / "cache"
    build(file, words, cache)
    (folder,) = cache.iterdir()
    if fault == "missing":
        (folder / "lengths.npy").unlink()
    else:
        np.save(folder / "tokens.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(DataError, match=r"a damaged cache of examples .*Delete the folder"):
        build(file, words, cache)
    shutil.rmtree(folder)
    assert len(build(file, words, cache)) == 2


def test_no_example_is_both_learnt_and_held_out(write, words):
    train = build(write("a.jsonl", [SHORT, LONG_ANSWER, SHORT, LONG_QUESTION]), words)
    held_out = build(write("b.jsonl", [SHORT, chat("she", "gladly")]), words)
    kept = drop_validation(train, held_out)
    assert {e.tokens.tobytes() for e in kept}.isdisjoint(e.tokens.tobytes() for e in held_out)
    assert kept.lengths.tolist() == [16, 19]
    assert kept.counts.dropped_in_validation == 2 and (kept.counts.tokens, kept.counts.supervised_tokens) == (35, 12)
    assert drop_validation(kept, held_out) is kept
    again = build(write("c.jsonl", [chat("she", "no, and that was not what was asked"), chat("where", "here")]), words)
    other_answers = build(write("d.jsonl", [chat("she", "gladly")]), words)
    assert len(drop_validation(again, other_answers)) == 2
    (left,) = drop_validation(again, other_answers, prompts=True)
    assert left.tokens.tobytes() == again[1].tokens.tobytes()
    with pytest.raises(DataError, match=r"all 4 examples also stand in data.validation"):
        drop_validation(train, train)
