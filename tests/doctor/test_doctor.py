"""The doctor tells the truth: each condition is made here, and its line changes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltakd.__main__ import main
from deltakd.base.scratch import Scratch, leftovers, sweep
from deltakd.doctor import around, examine, gpus, node, software
from deltakd.doctor.lines import Asked, warning

REPOSITORY = Path(__file__).parents[2]
PATH = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
DOCTOR = [sys.executable, "-m", "deltakd", "doctor"]


def asked(**given) -> Asked:
    return Asked(**given)


def run(tmp_path: Path, *words: str, before: str = "", **environment: str) -> tuple[int, dict[str, list[dict]], str]:
    """Run the doctor as a user does; returns its exit code, its lines by subject, and what it said on stderr."""
    report = tmp_path / "report.json"
    command = f"{before}{' '.join([*DOCTOR, '--json', str(report), *words])}"
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": PATH, **environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=given, cwd=tmp_path)
    assert report.is_file(), done.stderr
    found: dict[str, list[dict]] = {}
    for line in json.loads(report.read_text())["lines"]:
        assert line["text"] in done.stdout and (line["todo"] != "") == (line["status"] != "ok"), line
        found.setdefault(line["subject"], []).append(line)
    return done.returncode, found, done.stderr


def of(found: dict[str, list[dict]], subject: str) -> list[str]:
    return [line["status"] for line in found[subject]]


def test_a_sound_machine_has_no_error_and_a_faulty_one_as_many_as_it_has_faults(tmp_path):
    extensions = tmp_path / "extensions"
    clean = {"TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"}
    memory = tmp_path / "shm"
    memory.mkdir()
    code, found, _ = run(tmp_path, "--shared-memory", str(memory), **clean)
    assert (code, of(found, "build locks"), of(found, "threads")) == (0, ["ok"], ["ok"])
    assert of(found, "open files") == ["ok"] and found["disk"][0]["text"].endswith("free in runs")

    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, found, said = run(
            tmp_path,
            *("--shared-memory", str(tmp_path / "none"), "--runs", str(lock / "runs"), "--port", port),
            before="ulimit -n 200; ",
            **{**clean, "OMP_NUM_THREADS": "many"},
        )
    faults = {
        subject: [line["text"] for line in lines if line["status"] == "error"] for subject, lines in found.items()
    }
    faults = {subject: texts for subject, texts in faults.items() if texts}
    assert set(faults) == {"open files", "shared memory", "disk", "ports", "threads"}
    assert of(found, "build locks") == ["warning"] and str(lock) in found["build locks"][0]["text"]
    assert faults["open files"][0].startswith("at most 200 ")
    assert faults["ports"][0].startswith(f"{port}, where students would meet, is taken: process {os.getpid()} ")
    assert code == 2 and said.startswith("deltakd: doctor: 5 of ") and len(said.splitlines()) == 1


def test_a_lock_that_a_build_holds_is_well_and_one_that_nobody_holds_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's FileBaton does
    assert str(os.getpid()) in str(software.build_locks(asked())[0]) and software.build_locks(asked())[0].status == "ok"
    os.close(descriptor)
    (left,) = software.build_locks(asked())
    assert left.status == "warning" and left.todo == f"Run rm {lock}"
    monkeypatch.setattr(software, "_is_shared", lambda path: True)  # on NFS another node may hold it
    assert software.build_locks(asked())[0].todo == f"If no node builds: rm {lock}"
    os.utime(lock, (time.time() - 7200,) * 2)
    assert software.build_locks(asked())[0].todo == f"Run rm {lock}"


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(examine, "examine", lambda _: [warning("x", "y", "z")])
    (tmp_path / "file").touch()
    assert main(["doctor", "--json", str(tmp_path / "file" / "report.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_caches_and_token_lie_where_the_hub_s_library_has_them(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("secret\n")
    assert around._token() == ("secret", str(tmp_path / "huggingface" / "token"))
    assert node.disks(asked())[1].text.endswith(f"free in {tmp_path}/huggingface/hub")


def test_a_machine_without_a_compiler_is_sound_since_no_op_is_compiled(tmp_path, monkeypatch):
    """The engine switches DeepSpeed's own communication off before it is built: nothing else would be."""
    import deepspeed

    from deltakd.engine.deepspeed import _adopt_group

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert software.deepspeed(asked())[0].status == "ok"
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    _adopt_group()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_a_tmpfs_that_is_full_is_an_error(tmp_path):
    """A tmpfs of our own, in a namespace where this user may mount one."""
    memory = tmp_path / "shm"
    memory.mkdir()
    mount = f"mount -t tmpfs -o size=80M none {memory} && "
    enter = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*enter, f"{mount} true"], capture_output=True).returncode:
        pytest.skip("this kernel lets no user mount a tmpfs")
    code = (
        "import sys; from pathlib import Path\n"
        "from deltakd.doctor import node; from deltakd.doctor.lines import Asked\n"
        "print(node.shared_memory(Asked(shared_memory=Path(sys.argv[1])))[0])"
    )
    shown = f'{sys.executable} -c "$CODE" {memory}'
    script = f"{mount} {shown} && head -c 20M /dev/zero > {memory}/taken && {shown}"
    environment = {**os.environ, "PYTHONPATH": PATH, "CODE": code}
    done = subprocess.run([*enter, script], capture_output=True, text=True, env=environment)
    before, after = done.stdout.splitlines()
    assert before.startswith("ok ") and after.startswith("error ") and "60 MiB free of 80 MiB" in after, done.stderr


def test_what_a_dead_run_left_is_told_apart_from_a_live_one_and_stays_until_it_is_swept(tmp_path):
    dead, living = tmp_path / "deltakd-dead", tmp_path / "living"
    dead.mkdir()
    living.mkdir()
    (dead / "lock").touch()
    (dead / "arena-0").write_bytes(bytes(2**21))
    with Scratch(living, "run"):
        assert leftovers(living) == [] and (living / "deltakd-run").is_dir()
    line = node.shared_memory(asked(shared_memory=tmp_path))[1]
    assert line.status == "warning" and line.text.startswith("2 MiB in 1 folders") and "tidy" in line.todo
    assert sweep(tmp_path) == [dead] and len(node.shared_memory(asked(shared_memory=tmp_path))) == 1


def test_a_missing_requirement_is_an_error_and_another_version_a_warning(tmp_path):
    for name, version in {"ninja_like": "1.5", "Other.Name": "2.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    wanted = ["ninja-like>=1,<2  # why", "other-name>=3", "absent==1.0", "# nothing"]
    *faults, last = software.requirements(asked(), wanted, [str(tmp_path)])
    assert [(line.status, line.text) for line in faults] == [
        ("warning", "other-name is 2.0, tested is other-name>=3"),
        ("error", "absent==1.0 is not installed"),
    ]
    assert last.text.startswith("1 of 3 as tested: ninja-like 1.5")


TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \t{link}\tSYS\t0-15\nGPU1\t{link}\t X \tSYS\t0-15\n"
)
PEERS = " \tGPU0\tGPU1\n GPU0\tX\t{peer}\n GPU1\t{peer}\tX\n\nLegend:\n  X = Self\n  OK = Status Ok\n"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put an nvidia-smi on the path that says what it is told, and two devices into the kernel."""

    def say(gpus_: str, link: str = "NV18", peer: str = "OK", code: int = 0) -> None:
        (tmp_path / "topo").write_text(TOPOLOGY.format(link=link))
        (tmp_path / "peers").write_text(PEERS.format(peer=peer))
        (tmp_path / "gpus").write_text(gpus_)
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/bash\ncd {tmp_path}\n[ {code} = 0 ] || {{ cat gpus; exit {code}; }}\n"
            'case "$*" in *-p2p*) cat peers;; topo*) cat topo;; *) cat gpus;; esac\n'
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for module in (gpus, software, node):
        monkeypatch.setattr(module, "nvidia_devices", lambda: [Path("/dev/nvidia0"), Path("/dev/nvidia1")])
    return say


def test_gpus_are_read_from_the_driver_s_own_tool(smi):
    smi("NVIDIA H200, 143771, 0, 570.1, Default\nNVIDIA H200, 143771, 100000, 570.1, Exclusive_Process\n")
    lines = gpus.driver(asked())
    assert lines[0].text == "2 x NVIDIA H200, 143771 MiB; driver 570.1"
    assert [line.text[:6] for line in lines[1:]] == ["GPU 1 ", "GPU 1:"]
    assert [line.text for line in gpus.wiring(asked())] == ["NVLink: NV18"]
    smi("", link="SYS", peer="CNS")
    assert [line.text for line in gpus.wiring(asked())] == [
        "PCIe for some: SYS",
        "GPU 0 cannot read GPU 1's memory",
    ]
    smi("NVIDIA-SMI has failed because it could not talk to the driver.", code=9)
    assert gpus.driver(asked())[0].status == "error" and "could not talk" in gpus.driver(asked())[0].text


def test_a_gpu_that_torch_cannot_compute_on_is_an_error(smi):
    """Here torch is the CPU's build, which the trial finds out for itself."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is built for CUDA")
    (line,) = gpus.trial(asked())
    assert (line.status, line.subject) == ("error", "cuda") and "not compiled with CUDA" in line.text
    assert software.torch_build(asked())[0].status == "error"


def test_a_probe_that_hangs_or_breaks_is_a_line_and_hides_no_other(monkeypatch):
    def breaks(_):
        raise KeyError("x")

    def hangs(_):
        time.sleep(5)

    monkeypatch.setattr(examine, "WAIT_S", 0.2)
    probes = (("breaks", breaks), ("hangs", hangs), ("sound", lambda _: [warning("sound", "is heard", "Go on")]))
    monkeypatch.setattr(examine, "PROBES", probes)
    begin = time.monotonic()
    assert [line.status for line in examine.examine(asked())] == ["error", "warning", "warning"]
    assert time.monotonic() - begin < 3


def test_the_hub_is_asked_once_and_a_token_that_it_refuses_is_said_without_being_shown(monkeypatch):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers.get("Authorization")
            self.send_response(401 if given == "Bearer wrong" else 200)
            self.end_headers()
            self.wfile.write(b'{"name": "anna"}')

        def log_message(self, *_):
            pass

    for name in (*around.OFFLINE, "HF_TOKEN_PATH", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        said = {}
        for token in ("", "right", "wrong"):
            monkeypatch.setenv("HF_TOKEN", token)
            (said[token],) = around.hub(asked())
        server.shutdown()
    assert [line.status for line in said.values()] == ["warning", "ok", "error"]
    assert "as anna" in said["right"].text and "wrong" not in str(said["wrong"])
    monkeypatch.setenv("HF_TOKEN", "hf_one\nhf_two")  # http.client's refusal would repeat it
    assert "hf_" not in around.hub(asked())[0].text and around.hub(asked())[0].status == "error"
    monkeypatch.setenv("HF_TOKEN", "right")
    for endpoint in ("http://127.0.0.1:9", "huggingface.co"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert "cannot be reached" in around.hub(asked())[0].text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert around.hub(asked())[0].status == "ok"


def test_slurm_is_complete_absent_or_named_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert around.slurm(asked())[0].text.startswith("not here")
    for name in around.SLURM:
        (tmp_path / name).write_text("#!/bin/sh\necho slurm 23.11.4\n")
        (tmp_path / name).chmod(0o755)
    assert around.slurm(asked())[0].text == "slurm 23.11.4; outside any job"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert around.slurm(asked())[0].text.startswith("slurm 23.11.4; inside job 77: ntasks 8")
    (tmp_path / "squeue").unlink()
    assert around.slurm(asked())[0].status == "warning"


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/x", "/" + 300 * "x"])
def test_a_folder_that_cannot_be_is_no_bug_of_ours(folder, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", folder[:100])
    for name in ("HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = examine.examine(asked(runs=Path(folder)))
    assert not [str(line) for line in lines if "Report it" in line.todo]
