"""docs/operator.md and docs/edge.md work as they are written: each line of their shell blocks is run, in the order in
which an operator and an edge engineer type them, on this machine, with made-up texts of one's own and three devices.

What is not as on the page is said here and nowhere else: `STAND_INS` (programs that need root), `substitutions` (paths,
names, ports), `TINY` (a model of this test's own), `NOT_RUN` (with reasons), and what a person does by hand (`Hands`).
"""

import csv
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

import fedlr.client.cli
import fedlr.server.cli
from fedlr.client.ledger_command import init
from fedlr.client.settings import load_settings
from fedlr.config.schema import compose_experiment
from fedlr.flower.node_key import create_node_key
from fedlr.models.network import tiny_random
from fedlr.runs.directory import read_json
from fedlr.server.enrol import enrol
from fedlr.tasks.synthetic import synthetic_text
from tests.server.live_superlink import BIN, QUIET, ROOT, free_port
from tests.server.stand_in_systemd import Systemd, Unit

PAGES = ("operator.md", "edge.md")
# In which order the blocks are typed: (page, number of its shell block).
ORDER = [("operator.md", 0), ("edge.md", 0), ("edge.md", 1), ("operator.md", 1), ("operator.md", 2), ("edge.md", 2)]
ORDER += [("operator.md", 3)]

NOT_RUN = {  # the beginning of a line: why
    "deploy/build-environment.sh /opt/fedlr": "downloads 0.4 GB; test_recipes.py runs its steps, marked slow",
}
NOT_STARTED = {"fedlr-watchdog.timer": "a timer; test_recipes.py runs what it starts"}
REFUSES = {  # the beginning of a line, and how often it has been typed: exit code
    ("as-client doctor", 0): 1,  # the page says so: the hash of the base model is not in the policy yet
}

STAND_INS = {  # programs that need root, or a machine that systemd started
    "sudo": '[ "$1" = -u ] && shift 2 && exec "$@"',
    "systemctl": 'echo "$@" >> "$STAND_IN/asked"',
    "systemd-sysusers": "exit 0",  # test_recipes.py runs the real one
    "systemd-tmpfiles": "grep '^d ' \"$STAND_IN/etc/tmpfiles.d/$2\" | while read -r _ path mode _; do "
    'install -d -m "$mode" "$path"; done',
    "install": 'for word; do shift; case $word in -o|-g) skip=1;; *) [ "$skip" ] || set -- "$@" "$word"; skip=;; esac; '
    'done; exec "$REAL_INSTALL" "$@"',  # without owners
    "journalctl": 'cat "$STAND_IN/logs/$2.log"',  # and does not wait for more
    "editor": 'cp "$STAND_IN/edited.yaml" "$1"',
}
TINY = {  # MiniLM, five rounds and 200 held-out rows take minutes
    "experiment=federation": "experiment=federation model=pretrained model.name_or_path={model} adapter.layers=[1] "
    "num_rounds=2 privacy.accountant=rdp",
    "data=table": "data=table data.max_length=32",
    "data.num_test=200": "data.num_test=40",
}


def blocks(page: str) -> list[list[str]]:
    """The lines of each shell block of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in found]


LINES = [(page, line) for page in PAGES for block in blocks(page) for line in block]


def is_run(line: str) -> bool:
    return not any(line.startswith(beginning) for beginning in NOT_RUN)


def test_every_block_is_typed_once_and_what_is_not_run_is_on_a_page() -> None:
    assert sorted(ORDER) == [(page, number) for page in sorted(PAGES) for number in range(len(blocks(page)))]
    for beginning in [*NOT_RUN, *(beginning for beginning, _ in REFUSES)]:
        assert any(line.startswith(beginning) for _, line in LINES), beginning
    named = {path for _, line in LINES for path in re.findall(r"(?<!\S)(?:deploy|client)/[\w./*-]+", line)}
    assert [path for path in named if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize(("page", "line"), LINES, ids=range(len(LINES)))
def test_every_command_of_a_line_exists_with_its_options(
    page: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line.split(" #")[0]
    for house, name, rest in re.findall(r"(?:\bas-|/fedlr |(?:^|& |until )fedlr )(server|client) (\w+)([^&|]*)", line):
        commands = {"server": fedlr.server.cli, "client": fedlr.client.cli}[house]
        assert name in commands.COMMANDS, line
        assert getattr(commands, house)([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert [option for option in re.findall(r"(?<!\S)--[\w-]+", rest) if option not in said] == [], line
    for unit in re.findall(r"(?<=\s)fedlr-[\w@]+(?:\.timer)?", line if line.startswith("systemctl") else ""):
        file = re.sub(r"@\w+$", "@", unit) + ("" if unit.endswith(".timer") else ".service")
        assert (ROOT / "deploy/systemd" / file).exists(), unit
    for overrides in re.findall(r'OVERRIDES="(.*)"', line):
        e = compose_experiment(["runtime=superlink", *overrides.split()])
        assert e.privacy.randomness == "os" and e.seed is None, "a page must not teach noise that can be subtracted"


class Shell:
    """One shell that lives from the first line to the last: aliases, folder and variables stay."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=folder, env=variables, start_new_session=True,
        )  # fmt: skip
        self.run("shopt -s expand_aliases")

    def run(self, line: str) -> tuple[int, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{{\n{line}\n}} < /dev/null\nprintf '\\n@@%s\\n' $?\n")
        self.process.stdin.flush()
        said = []
        for answer in self.process.stdout:
            if answer.startswith("@@"):
                return int(answer[2:]), "".join(said)
            said.append(answer)
        raise AssertionError(f"the shell ended at {line}: {''.join(said)}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Hands:
    """The machine, and what persons do on it that is no line of a page."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkout = root, root / "checkout"
        self.ports = {port: str(free_port()) for port in ("8443", "8470", "8000")}
        base = tiny_random(label_names=("negative", "positive"), seed=0)
        for part in (base.network, base.tokenizer):
            part.save_pretrained(root / "model")
        for folder in ("tmp", "var/lib", "srv", "etc/systemd/system", "stand-ins"):
            (root / folder).mkdir(parents=True)
        for path in [*(ROOT / "deploy").rglob("*"), ROOT / "client/example.yaml"]:
            if path.is_file():
                copy = self.checkout / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(self.substituted(path.read_text()))
                copy.chmod(path.stat().st_mode)
        for name, script in STAND_INS.items():
            (root / "stand-ins" / name).write_text(f"#!/bin/sh\n{script}\n")
            (root / "stand-ins" / name).chmod(0o755)
        self.texts("letters.csv", 0)
        self.texts("held-out.csv", 1)
        self.systemd = Systemd(root / "etc/systemd/system", root / "logs")
        self.said: dict[str, str] = {}

    def substituted(self, text: str) -> str:
        """Paths below this test's folder, names and ports of loopback."""
        table = {f"/{top}/": f"{self.root}/{top}/" for top in ("etc", "srv", "tmp")} | self.ports
        table |= {"/var/lib/": f"{self.root}/var/lib/", "/opt/fedlr/bin": str(BIN)}
        table |= {"fl.example.org": "127.0.0.1", "0.0.0.0": "127.0.0.1"}
        return re.sub("|".join(map(re.escape, table)), lambda found: table[found[0]], text)

    def variables(self) -> dict[str, str]:
        real = shutil.which("install")
        assert real is not None
        own = {"STAND_IN": str(self.root), "REAL_INSTALL": real, "EDITOR": str(self.root / "stand-ins/editor")}
        path = f"{self.root / 'stand-ins'}:{os.environ['PATH']}"
        return dict(os.environ) | QUIET | own | {"PATH": path, "PYTHONPATH": str(ROOT)}

    def texts(self, name: str, seed: int) -> None:
        data = synthetic_text(100, seed=seed)
        with (self.root / "tmp" / name).open("w", newline="") as file:
            rows = zip(data.texts, (data.label_names[label] for label in data.labels), strict=True)
            csv.writer(file).writerows([("text", "label"), *rows])

    def before(self, line: str) -> None:
        """What has come by mail, and what is typed into an editor."""
        tmp, etc = self.root / "tmp", self.root / "etc/fedlr"
        if " ward-3.pub" in line.replace("/", " "):
            shutil.copy(etc / "client/device.key.pub", tmp / "ward-3.pub")
        if "revoke" in line:
            for name in ("ward-1", "ward-2", "ward-9"):
                create_node_key(tmp / f"{name}.key")
                there = ["--superlink", f"127.0.0.1:{self.ports['8000']}", "--superlink-ca", str(etc / "server/ca.crt")]
                there += ["--roster", str(etc / "server/roster.json"), "--name", name]
                assert enrol([*there, str(tmp / f"{name}.key.pub")]) == 0
        if "/tmp/ca.crt" in line:
            shutil.copy(self.checkout / "keys/ca.crt", tmp / "ca.crt")
            shutil.copy(etc / "server/ward-terms.json", tmp / "terms.json")
        if line.startswith('"${EDITOR'):
            tree = yaml.safe_load((etc / "client/client.yaml").read_text())
            tree["model"]["name_or_path"] = str(self.root / "model")
            tree["privacy"]["accountant"] = "rdp"
            if shown := re.findall(r"body ([0-9a-f]{64}) is not in policy", self.said.get("as-client doctor", "")):
                tree["policy"]["allowed_models"] = shown
            (self.root / "edited.yaml").write_text(yaml.safe_dump(tree))

    def after(self, line: str) -> None:
        """What systemd does when it is asked."""
        asked = self.root / "asked"
        for words in asked.read_text().splitlines() if asked.exists() else []:
            for unit in words.split():
                if unit.startswith("fedlr-") and unit not in NOT_STARTED:
                    self.systemd.start(unit)
                    if unit == "fedlr-client":
                        self.other_devices()
        asked.unlink(missing_ok=True)

    def other_devices(self) -> None:
        """Two machines more: the same unit, each with settings of its own."""
        text = (self.root / "etc/fedlr/client/client.yaml").read_text()
        unit = self.systemd.folder / "fedlr-client.service"
        for name in ("ward-1", "ward-2"):
            settings = self.root / "etc/fedlr/client" / f"{name}.yaml"
            other = text.replace("device.key", str(self.root / f"tmp/{name}.key")).replace("ward-3", name)
            settings.write_text(other.replace("lib/fedlr-client", f"lib/{name}"))
            assert init([str(settings)]) == 0
            own = unit.read_text().replace("client.yaml", f"{name}.yaml").replace("lib/fedlr-client", f"lib/{name}")
            unit.with_name(f"{name}.service").write_text(own)
            self.systemd.start(name)


@pytest.mark.slow  # a minute or two: ten processes that load torch
@pytest.mark.timeout(900)
def test_the_pages_make_a_federation_that_trains(tmp_path: Path) -> None:
    for program in ("bash", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    hands, typed = Hands(tmp_path / "machine"), dict[str, int]()
    shell = Shell(hands.checkout, hands.variables())
    tiny = {old: new.format(model=hands.root / "model") for old, new in TINY.items()}
    try:
        with hands.systemd:
            for page, number in ORDER:
                for line in filter(is_run, blocks(page)[number]):
                    words = " ".join(line.split()[:2])
                    hands.before(line)
                    here = re.sub("|".join(map(re.escape, tiny)), lambda found: tiny[found[0]], hands.substituted(line))
                    code, said = shell.run(here)
                    hands.said[words] = said
                    assert code == REFUSES.get((words, typed.get(words, 0)), 0), (
                        f"{page}: {line}\n{said}\n{logs(hands)}"
                    )
                    typed[words] = typed.get(words, 0) + 1
                    hands.after(line)
            check_results(hands)
    finally:
        shell.close()


def logs(hands: Hands) -> str:
    """The end of what every process said."""
    files = sorted((hands.root / "logs").glob("*.log"))
    return "\n".join(f"--- {file.stem}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def check_results(hands: Hands) -> None:
    """The run ended by itself, with every device in every round and each ledger charged; the page was followed."""
    rounds: Unit = hands.systemd.units["fedlr-server@ward"]
    deadline = time.monotonic() + 300
    while rounds.code != 0:
        assert time.monotonic() < deadline, logs(hands)
        time.sleep(0.1)
    run_dir = hands.root / "var/lib/fedlr-server/ward"
    assert 0 < read_json(run_dir / "summary.json")["epsilon_max"] <= 6
    clients = [json.loads(row) for row in (run_dir / "clients.jsonl").read_text().splitlines()]
    assert [row["status"] for row in clients] == ["trained"] * 6, logs(hands)
    for name in ("client", "ward-1", "ward-2"):
        ledger = load_settings(hands.root / f"etc/fedlr/client/{name}.yaml").open_ledger()
        assert ledger is not None and ledger.participations(0) == 2
    assert '"superlink":"ok"' in hands.said["curl --retry"].replace(" ", "")
    assert "ward-3: client 0" in hands.said["as-server devices"] and "ward-9" in hands.said["as-server revoke"]
    assert (
        "REFUSE" not in hands.said["as-client doctor"]
        and "with the base model that is here" in hands.said["as-client doctor"]
    )
    assert "connected to 127.0.0.1" in logs(hands)
    assert "the run has ended" in hands.said["until fedlr"]
