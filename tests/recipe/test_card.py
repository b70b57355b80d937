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


def read(run):
    card = (run / "export" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_run_s_card_names_models_rows_settings_and_commit_and_then_its_scores(lab, tmp_path, capsys):
    lab.train("carded")
    run = lab.folder / "runs" / "carded"
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


def test_a_card_that_may_not_be_written_costs_no_table(lab, capsys, monkeypatch):
    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(evaluation, "card_scores", refuse)
    run = lab.folder / "runs" / "carded"
    words = ["evaluate", str(lab.recipe), "--model", str(run), "--teacher", "none", "evaluation.num_prompts=4"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert f"warning: {run}/export/README.md: its scores are not put there (Permission denied)" in said.err
    assert "| carded |" in said.out


def test_a_model_of_the_hub_is_linked_and_a_local_one_is_not(lab, tmp_path):
    made = tmp_path / "run"
    (made / "export").mkdir(parents=True)
    for name in ("recipe.yaml", "run.json"):
        (made / name).write_text((lab.folder / "runs" / "carded" / name).read_text())
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
def test_what_cannot_be_pushed_is_said_in_one_sentence(lab, words, changes, sentence):
    run = str(lab.folder / "runs" / "carded")
    given = [f"{name}={value}" for name, value in changes.items()]
    push = [run if word == "RUN" else word for word in words]
    command = [sys.executable, "-m", "deltakd", "push", *push]
    done = lab.run("env", "-u", "HF_HUB_OFFLINE", "-u", "HF_TOKEN", *given, *command)
    assert done.returncode == 2 and f"deltakd: {sentence}" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def hub():
    """A hub that knows everybody and makes nothing; `asked` holds what it was to make."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say(200, {"name": "me", "type": "user"})

        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._say(403, {"error": "not here"})

        def _say(self, code, said):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *said):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("words, visibility", [([], "private"), (["--public"], "public")])
def test_a_model_is_private_on_the_hub_unless_public_is_typed(lab, hub, words, visibility):
    given = [f"HF_ENDPOINT=http://127.0.0.1:{hub.server_port}", "HF_TOKEN=hf_none"]
    command = [sys.executable, "-m", "deltakd", "push", str(lab.folder / "runs" / "carded"), "--to", "me/it", *words]
    done = lab.run("env", "-u", "HF_HUB_OFFLINE", *given, *command)
    assert done.returncode == 2 and "deltakd: push: the hub failed at making me/it (" in done.stderr
    [made] = hub.asked
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "it", visibility)
