"""A Slurm of three nodes on this machine: slurmctld, munged, and a slurmd in namespaces of its own for every node.

A node has its own hostname, address, process table and /dev/shm, so sockets and shared memory are those of a machine of
its own; processors and disks are this machine's. Needs root, slurm-wlm, munge and iproute2.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

NUM_NODES = 3
GPUS = 4  # character devices that nobody opens
CPUS = 8  # more than there are: real work shares the machine's
SHARED_MEMORY_MIB = 256
NEEDED = ("setpriv", "slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
DEADLINE_S = 60
WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a test session that is killed leaves no cluster

CONFIGURATION = """\
ClusterName={tag}
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmdPort={port_of_nodes}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=3
TCPTimeout=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,bf_max_time=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""

NODE = """\
hostname {name}
mount -t tmpfs -o size={shm}m tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
export SLURM_CONF={folder}/slurm.conf
slurmd -D -N {name} & wait $!
"""


def missing() -> str | None:
    """Say what this machine lacks for a cluster; None if it has all."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "needs the right to make namespaces"
    return None


class Cluster:
    """Three nodes, and the commands that users type at them; use with `with`."""

    def __init__(self, folder: Path) -> None:
        number = secrets.randbelow(200)
        self.folder, self.tag, self.net = folder, f"dk{number}x", f"10.{213 + number % 40}.{number}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._inits: dict[int, subprocess.Popen[bytes]] = {}
        self._munged: subprocess.Popen[bytes] | None = None
        self._slurmctld: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in list(self._inits):
            self.kill(node)
        for daemon in (self._slurmctld, self._munged):
            if daemon is not None:
                daemon.terminate()
                daemon.wait()
        for node in range(1, NUM_NODES + 1):
            subprocess.run(["ip", "link", "del", f"{self.tag}v{node}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._namespace(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.tag], capture_output=True)

    def _namespace(self, node: int) -> str:
        return f"{self.tag}-{node}"

    def address(self, node: int) -> str:
        """Return a node's address."""
        return f"{self.net}.{10 + node}"

    def _configure(self) -> None:
        for name in ("state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True)
        host = os.uname().nodename.partition(".")[0]
        nodes = range(1, NUM_NODES + 1)
        ports = 20_000 + secrets.randbelow(10_000)
        text = CONFIGURATION.format(
            tag=self.tag,
            host=host,
            net=self.net,
            port=ports,
            port_of_nodes=ports + 1,
            folder=self.folder,
            cpus=CPUS,
            gpus=GPUS,
            nodes="\n".join(f"NodeName=node{node} NodeAddr={self.address(node)}" for node in nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        devices = f"{self.folder}/dev/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{NUM_NODES}] Name=gpu File={devices}\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used; looking for one fails
        for gpu in range(GPUS):
            os.mknod(self.folder / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        hosts = ["127.0.0.1 localhost", f"{self.net}.1 {host}"]
        (self.folder / "hosts").write_text(
            "\n".join([*hosts, *(f"{self.address(node)} node{node}" for node in nodes)]) + "\n"
        )
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once: no waiting for names
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.folder.chmod(0o755)

    def _start(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        ip("link", "add", self.tag, "type", "bridge", "forward_delay", "0")
        ip("addr", "add", f"{self.net}.1/24", "dev", self.tag)
        ip("link", "set", self.tag, "up")
        for node in range(1, NUM_NODES + 1):
            space, cable = self._namespace(node), f"{self.tag}v{node}"
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", self.tag, "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        files = {name: f"{self.folder}/munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={files[name]}" for option, name in options.items()]
        self._munged = subprocess.Popen(
            [*WITH_US, "munged", "--foreground", "--force", *words], stderr=subprocess.DEVNULL
        )
        wait_until(lambda: Path(files["socket"]).exists(), "munged")
        self._slurmctld = subprocess.Popen(
            [*WITH_US, "slurmctld", "-D"], env=self.environment, stderr=subprocess.DEVNULL
        )
        for node in range(1, NUM_NODES + 1):
            self.boot(node)
        wait_until(lambda: self.states() == ["idle"] * NUM_NODES, "idle nodes")

    def boot(self, node: int) -> None:
        """Start a node."""
        name = f"node{node}"
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        script = NODE.format(name=name, folder=self.folder, shm=SHARED_MEMORY_MIB)
        apart = ["--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [
            *WITH_US,
            "nsenter",
            f"--net=/run/netns/{self._namespace(node)}",
            "unshare",
            *apart,
            "bash",
            "-c",
            script,
        ]
        with (self.folder / f"console.{name}").open("ab") as console:
            self._inits[node] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )

    def kill(self, node: int) -> None:
        """Have a node lose its power: every process of it is gone at once."""
        init = self._inits.pop(node)
        below = psutil.Process(init.pid).children(recursive=True)
        init.send_signal(signal.SIGKILL)
        init.wait()
        psutil.wait_procs(below, timeout=DEADLINE_S)

    def within(self, node: int, *command: str) -> list[str]:
        """Return a command as it is run within a node, from outside."""
        (inner,) = psutil.Process(self._inits[node].pid).children()
        return ["nsenter", f"--target={inner.pid}", "--net", "--uts", "--ipc", "--mount", "--pid", *command]

    def on(self, node: int, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command within a node."""
        return subprocess.run(self.within(node, *command), capture_output=True, text=True)

    def separate(self, one: int, other: int, again: bool = False) -> None:
        """Cut the way between two nodes; `again`: let them reach each other as before."""
        for here, there in ((one, other), (other, one)):
            change = ["ip", "-n", self._namespace(here), "route", "del" if again else "add", "blackhole"]
            subprocess.run([*change, f"{self.address(there)}/32"], check=True)

    def say(self, *command: str) -> str:
        """Run one of Slurm's commands; return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Return the state of every node."""
        done = subprocess.run(["sinfo", "-hN", "-p", "main", "-o", "%T"], env=self.environment, capture_output=True)
        return done.stdout.decode().split()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job; of a heterogeneous one, of its first part."""
        words = self.say("scontrol", "show", "job", number).split("\n\n")[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def wait_until(condition, what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.1)
