"""What is written is on the disk before its name is: no loss of power leaves a name with nothing behind it."""

import os
from pathlib import Path

from deltakd.base.files import put_in_place, write_text


def test_a_name_is_given_only_to_what_the_disk_holds(tmp_path, monkeypatch):
    """The order of the calls to the system itself."""
    said = []

    def told(call, say):
        def telling(*arguments):
            said.append(say(*arguments))
            return call(*arguments)

        return telling

    monkeypatch.setattr(os, "fsync", told(os.fsync, lambda number: Path(f"/proc/self/fd/{number}").readlink().name))
    monkeypatch.setattr(os, "replace", told(os.replace, lambda old, new: f"{Path(old).name} to {Path(new).name}"))
    write_text(tmp_path / "run.json", "{}")
    part = f"run.json.{os.getpid()}.part"
    assert said == [part, f"{part} to run.json"]
    write_text(tmp_path / "it.part" / "in" / "a", "x", lasting=False)
    del said[:]
    put_in_place(tmp_path / "it.part", tmp_path / "it")
    assert sorted(said[:3]) == ["a", "in", "it.part"] and said[3:] == ["it.part to it", tmp_path.name]
    assert (tmp_path / "it" / "in" / "a").read_text() == "x"
