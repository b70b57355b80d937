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


def test_an_id_that_the_hub_refuses_is_told_apart_from_a_hub_that_is_away(refusing_hub):
    with pytest.raises(DataError, match=r"nobody/nothing: neither a local path nor a dataset .*HTTP 404"):
        load_rows(SourceSettings(path="nobody/nothing"))
