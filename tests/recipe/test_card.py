"""The card of an export says what is in the run's own files, in the hub's format; nothing is pushed by mistake."""

import errno
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import yaml

from deltakd.__main__ import main
from deltakd.base.rundir import RunDirectory
from deltakd.recipe import evaluation
from deltakd.recipe.card import write_card
from tests.conftest import chat_rows, write_rows


@pytest.fixture(scope="module")
def run(lab):
    lab.train("carded")
    return lab.folder / "runs" / "carded"


def read(run):
    card = (run / "export" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_run_s_card_names_models_rows_settings_and_commit_and_then_its_scores(lab, run, tmp_path, capsys):
    front, body = read(run)
    facts = json.loads((run / "run.json").read_text())
    assert front["library_name"] == "transformers" and "deltakd" in front["tags"] and "model-index" not in front
    assert facts["commit"] in body and f"{facts['data']['supervised_tokens']:,} supervised tokens" in body
    assert str(lab.folder / "teacher") in body and "target `delta`" in body and "Not measured yet." in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(
        (run / "recipe.yaml").read_text()
    )

    rows = write_rows(tmp_path / "others.jsonl", chat_rows(200, 4))
    words = ["evaluate", str(lab.recipe), "--model", str(run), "--teacher", "none", f"data.validation.path={rows}"]
    words += ["evaluation.num_prompts=4"]
    assert main(words) == 0, capsys.readouterr().err
    results = json.loads((lab.folder / "runs" / "evaluations" / "paper" / "results.json").read_text())
    (found,) = results["models"].values()
    front, body = read(run)
    scored = {one["name"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert scored["rougeL"] == round(found["rougeL"], 4) and "Not measured yet" not in body
    assert f"| cross_entropy | {found['cross_entropy']:.4f} |" in body
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == str(rows) and f", 4 prompts of `{rows}`" in body


def test_a_card_that_may_not_be_written_costs_no_table(lab, run, capsys, monkeypatch):
    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(evaluation, "card_scores", refuse)
    words = ["evaluate", str(lab.recipe), "--model", str(run), "--teacher", "none", "evaluation.num_prompts=4"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert f"warning: {run}/export/README.md: its scores are not put there (Permission denied)" in said.err
    assert "| carded |" in said.out


def test_a_model_of_the_hub_is_linked_and_a_local_one_is_not(run, tmp_path):
    made = tmp_path / "run"
    (made / "export").mkdir(parents=True)
    for name in ("recipe.yaml", "run.json"):
        (made / name).write_text((run / name).read_text())
    recipe = yaml.safe_load((made / "recipe.yaml").read_text())
    recipe["models"]["teacher"]["weights"] = "Qwen/Qwen2.5-7B"
    (made / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_card(RunDirectory(made))
    front, _ = read(made)
    assert front["base_model"] == ["Qwen/Qwen2.5-7B"] and "datasets" not in front


@pytest.mark.parametrize(
    "words, changes, sentence",
    [
        (["nowhere", "--to", "me/it"], {}, "nowhere: no finished run."),
        (["RUN", "--to", "it"], {}, "--to: it is no id of the hub."),
        (["RUN", "--to", "me/it"], {"HF_HUB_OFFLINE": "1"}, "push: HF_HUB_OFFLINE is set"),
        (["RUN", "--to", "me/it"], {"HF_HOME": "/nowhere"}, "push: no token of the hub is here. Set HF_TOKEN to one"),
        (
            ["RUN", "--to", "me/it"],
            {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"},
            "push: the hub failed at who you are ([Errno 111] Connection refused)",
        ),
    ],
)
def test_what_cannot_be_pushed_is_said_in_one_sentence(lab, run, words, changes, sentence):
    given = [f"{name}={value}" for name, value in changes.items()]
    push = [str(run) if word == "RUN" else word for word in words]
    command = [sys.executable, "-m", "deltakd", "push", *push]
    done = lab.run("env", "-u", "HF_HUB_OFFLINE", "-u", "HF_TOKEN", *given, *command)
    assert done.returncode == 2 and f"deltakd: {sentence}" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def hub():
    """A hub that knows everybody, has the models in `known`, public or not, and keeps what it is asked and given."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/api/models/")
            self._say(200, {"name": "me", "type": "user", "id": name, "private": self.server.known.get(name)})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self._say(409 if name in self.server.known else 200, {"url": f"{self.server.at}/{name}"})
                self.server.known.setdefault(name, asked["visibility"] == "private")
            elif "/preupload/" in self.path:
                files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
                self._say(200, {"files": files})
            elif "/commit/" in self.path:
                lines = map(json.loads, body.splitlines())
                self.server.given = {one["value"]["path"] for one in lines if one["key"] == "file"}
                self._say(200, {"commitUrl": f"{self.server.at}/me/it/commit/1", "commitOid": "1"})
            else:  # the front matter of a card is to be looked at
                self._say(200, {"errors": [], "warnings": []})

        def _say(self, code, said):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *said):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.at = f"http://127.0.0.1:{server.server_port}"
        server.known, server.given = {"me/shown": False, "me/hidden": True}, None
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def push(lab, run, hub, *words):
    given = [f"HF_ENDPOINT={hub.at}", "HF_TOKEN=hf_none"]
    command = [sys.executable, "-m", "deltakd", "push", str(run), "--to", *words]
    return lab.run("env", "-u", "HF_HUB_OFFLINE", *given, *command)


@pytest.mark.parametrize(
    "words, private",
    [(["me/it"], True), (["me/it", "--public"], False), (["me/hidden"], True), (["me/shown", "--public"], False)],
)
def test_the_export_and_nothing_else_is_pushed_private_unless_public_is_typed(lab, run, hub, words, private):
    done = push(lab, run, hub, *words)
    assert done.returncode == 0 and f"lies in {words[0]}" in done.stdout, done.stderr
    assert hub.known[words[0]] is private
    assert hub.given == {path.name for path in (run / "export").iterdir()} and "model.safetensors" in hub.given


def test_what_shall_be_private_is_not_put_where_everybody_reads(lab, run, hub):
    done = push(lab, run, hub, "me/shown")
    assert done.returncode == 2 and hub.given is None
    assert "deltakd: --to: me/shown is on the hub already, and public. Write --public, or another name." in done.stderr
