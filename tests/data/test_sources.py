"""Rows come in order with their file and place, and what cannot be read is named in one sentence."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deltakd.base.errors import DataError
from deltakd.base.hub import refuse_unreachable
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import identity, load_rows

ROWS = [{"text": f"row {number}"} for number in range(1, 4)]


def read(path, **more):
    return [(where, row["text"]) for where, row in load_rows(SourceSettings(path=str(path), **more))]


def test_every_kind_of_file_gives_the_same_rows(tmp_path, write):
    import pyarrow
    from pyarrow import parquet

    lines = write("a.jsonl", ROWS).read_bytes()
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"):
        file = tmp_path / name
        assert read(file) == [(f"{file}:{number}", f"row {number}") for number in (1, 2, 3)], name


def test_a_folder_and_a_pattern_read_their_files_in_order_and_rows_are_counted_in_each(tmp_path, write):
    a, b = write("a.jsonl", ROWS), write("b.jsonl", ROWS)
    (tmp_path / "notes.md").write_text("not rows")
    whole = [(f"{file}:{number}", f"row {number}") for file in (a, b) for number in (1, 2, 3)]
    assert read(tmp_path) == read(f"{tmp_path}/[ab].jsonl") == whole
    assert read(tmp_path, skip_rows=2, num_rows=3) == whole[2:5]
    assert read(tmp_path, skip_rows=4) == whole[4:]
    assert read(tmp_path, num_rows=100) == whole


def test_a_file_that_changed_is_read_again_even_at_the_same_size(write):
    file = write("a.jsonl", [{"text": "one"}])
    before = identity(SourceSettings(path=str(file)))
    assert read(file) == [(f"{file}:1", "one")]
    time.sleep(0.01)  # file systems stamp times in steps of a few milliseconds
    write("a.jsonl", [{"text": "two"}])
    assert read(file) == [(f"{file}:1", "two")]
    assert identity(SourceSettings(path=str(file))) != before


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("empty.json", b"[]", "no rows in it"),
        ("bad.jsonl", b'{"text": "x"}\n\n{"text": \n', ":3: not JSON (Expecting value at column 9)"),
        ("cut.jsonl", b'{"text": "x"}\n{"text": "y', ":2: not JSON (Unterminated string starting at column 10)"),
        ("scalar.jsonl", b'{"text": "x"}\n5\n', ":2: int where an object with columns belongs"),
        ("list.json", b'[{"text": "x"},\n {"text" "y"}]', ":2: not JSON"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:30], "cannot be read (Compressed file ended"),
        ("not.parquet", b"no such thing", "cannot be read (Parquet magic bytes not found"),
        ("rows.csv", b"text\nx", "cannot read rows.csv"),
    ],
)
def test_a_file_without_readable_rows_is_named_with_its_fault(tmp_path, name, content, fragment):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_rows(SourceSettings(path=str(file)))
    message = str(refusal.value)
    assert message.startswith(str(file)) and fragment in message
    assert "\n" not in message and len(message) < 400 and message.endswith(".")


@pytest.mark.parametrize("path", ["gone.jsonl", "some/deep/folder", "./gone", "*.jsonl"])
def test_a_path_that_is_neither_here_nor_a_hub_id_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist|no files there"):
        load_rows(SourceSettings(path=path))


def test_skipping_every_row_is_refused(write):
    file = write("a.jsonl", ROWS)
    with pytest.raises(DataError, match="no rows left of 3 after skip_rows 3"):
        load_rows(SourceSettings(path=str(file), skip_rows=3))


def choosing(path, **more):
    return [(where, row["n"]) for where, row in load_rows(SourceSettings(path=str(path), **more))]


def solutions(count):
    """Every third row has no answer, and lengths go round from 0 to 6."""
    for n in range(count):
        kind = "no_answer_extracted" if n % 3 == 0 else "has_answer_extracted"
        yield {"n": n, "problem_type": kind, "solution": "x" * (n % 7), "messages": [{"role": "user", "content": "ab"}]}


CACHED = list(solutions(30))
CHOICE = {"where": {"problem_type": ["has_answer_extracted"]}, "max_characters": {"solution": 3}}


def test_rows_are_let_in_before_they_are_counted_and_keep_their_places(write):
    file = write("a.jsonl", list(solutions(40)))
    expected = [(f"{file}:{n + 1}", n) for n in range(40) if n % 3 and n % 7 <= 3]
    assert choosing(file, **CHOICE) == expected
    assert choosing(file, **CHOICE, skip_rows=2, num_rows=5) == expected[2:7]
    with pytest.raises(DataError, match="where names problem_typ, no column of n, problem_type"):
        choosing(file, where={"problem_typ": ["x"]})
    with pytest.raises(DataError, match="no rows left of 40, of which where and max_characters let in 0, after skip"):
        choosing(file, max_characters={"messages": 5})  # role and content are six
    assert len(choosing(file, max_characters={"messages": 6})) == 40


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Stand in for the hub: a set of ten million rows that counts how many are fetched."""
    import datasets

    pulled = []

    def rows():
        for row in solutions(10**7):
            pulled.append(row["n"])
            yield row

    def load_dataset(path, streaming, **_):
        return datasets.IterableDataset.from_generator(rows) if streaming else datasets.Dataset.from_list(CACHED)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("deltakd.data.sources.refuse_unreachable", lambda *_: None)
    return pulled


def test_of_a_hub_s_rows_no_more_are_fetched_than_are_used_and_those_only_once(stream):
    expected = [(f"org/rows:{n + 1}", n) for n in range(100) if n % 3 and n % 7 <= 3][4:14]
    for _ in range(2):
        assert choosing("org/rows", **CHOICE, skip_rows=4, num_rows=10) == expected
    assert stream == list(range(expected[-1][1] + 1))
    with pytest.raises(DataError, match="org/rows: where names kind, no column of n, problem_type, solution, messages"):
        choosing("org/rows", where={"kind": ["x"]}, num_rows=1)


def test_offline_the_first_rows_come_from_the_library_s_own_cache(stream, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert choosing("org/kept", **CHOICE, num_rows=2) == [("org/kept:2", 1), ("org/kept:3", 2)] and stream == []


def test_a_hub_that_cannot_be_reached_is_said_within_seconds(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"the hub cannot be reached .*Write a local path, or set HF_HUB_OFFLINE=1"):
        load_rows(SourceSettings(path="HuggingFaceH4/ultrachat_200k", split="train_sft"))
    assert time.monotonic() - begin < 15


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse_unreachable("model", "some/model", None, DataError)


@pytest.fixture
def refusing_hub(monkeypatch) -> Iterator[None]:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def gating_hub(monkeypatch) -> Iterator[None]:
    """A hub that tells everyone of a gated model, and gives it to nobody."""

    class Gate(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403 if self.path.endswith("/auth-check") else 200)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
            self.wfile.write(b'{"id": "meta/llama", "gated": "manual"}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Gate) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_a_gated_model_is_refused_with_the_page_of_its_licence_before_anything_is_fetched(gating_hub):
    with pytest.raises(
        DataError, match=r"meta/llama: gated, .*Accept its licence at http\S+/meta/llama, then set HF_TO"
    ):
        refuse_unreachable("model", "meta/llama", None, DataError)


def test_an_id_that_the_hub_refuses_is_told_apart_from_a_hub_that_is_away(refusing_hub):
    with pytest.raises(DataError, match=r"nobody/nothing: neither a local path nor a dataset .*HTTP 404"):
        load_rows(SourceSettings(path="nobody/nothing"))
