"""The doctor finds each thing that is wrong with a device, says what to change, and leaves everything as it was."""

import json
import shutil
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedlr.client.doctor import doctor
from fedlr.client.ledger_command import init, ledger
from fedlr.client.server_checks import clock_text
from fedlr.client.settings import load_settings
from fedlr.errors import InputError
from fedlr.privacy.mechanism import Mechanism
from fedlr.server.certificates import write_certificates
from fedlr.server.enrol import SuperLink, register
from tests.client.device_files import (
    LANGUAGE,
    PICTURES,
    client_yaml,
    device_settings,
    language_terms,
    picture_terms,
    terms_tree,
)
from tests.server.live_superlink import superlink

OK = ("files", "memory", "device", "disk", "model", "data", "ledger")


def examined(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, str], str]:
    """Return the exit code, the findings that refuse, and all that was said."""
    code = doctor([str(path), *options])
    said = capsys.readouterr().out
    lines = [line.split(maxsplit=2) for line in said.splitlines() if line.startswith("REFUSE ")]
    return code, {name: text for _, name, text in lines}, said


class Server:
    """A TLS server that answers everything with 404 and the time that it is told."""

    def __init__(self, folder: Path) -> None:
        write_certificates(folder, ["localhost"])
        self.ahead, self.folder = timedelta(0), folder
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(404)
                self.send_header("Date", format_datetime(datetime.now(UTC) + server.ahead, usegmt=True))
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def path(server: Server, tmp_path: Path) -> Path:
    """Return the settings of a device that is ready to train."""
    return ready(tmp_path, server)


def ready(tmp_path: Path, server: Server, **changes: Any) -> Path:
    server.ahead = timedelta(0)
    server_section = {
        "address": f"localhost:{server.port}",
        "root_certificates": str(server.folder / "ca.crt"),
        "private_key": "device.key",
    }
    device_settings(tmp_path / "device", server=server_section, **changes)
    return tmp_path / "device" / "client.yaml"


def test_device_that_is_ready_is_told_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    code, refused, said = examined(path, capsys, "--no-join")
    assert (code, refused) == (0, {}), said
    assert all(f"ok      {name} " in said for name in (*OK, "server", "clock"))
    assert "40 rows" in said and "negative, positive" in said and "epsilon 0 of 6 spent in 0 rounds" in said
    assert "will refuse more than 100 steps a round" in said and "WILL ACCEPT" not in said
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "another model": ({"policy__allowed_models": ["0" * 64]}, "model", "not in policy.allowed_models"),
    "no such model": ({"model__hidden_size": 15}, "model", "multiple of model.num_heads"),
    "a key of another model": ({"model__depth": 3}, "model", "'model.depth'"),
    "data that are not there": ({"data__path": "other.csv"}, "data", "There is no file"),
    "a label that is not named": ({"data__labels": ["negative", "neutral"]}, "data", "is not one of"),
    "a delta of one row": ({"privacy__delta": 0.1}, "data", "Expected privacy.delta below 1/40"),
    "more threads than processors": ({"runtime__num_workers": 10_000}, "device", "runtime.num_workers=10000"),
}


@pytest.mark.parametrize(("changes", "name", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found_and_nothing_else(
    changes: dict[str, Any], name: str, words: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, refused, said = examined(ready(tmp_path, server, **changes), capsys, "--no-join")
    assert (code, list(refused)) == (1, [name]) and words in refused[name], said


def test_a_disk_with_too_little_room_is_found(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    code, refused, said = examined(ready(tmp_path, server), capsys, "--no-join")
    assert (code, list(refused)) == (1, ["disk"]) and "policy.max_trained_values" in refused["disk"], said


def test_settings_that_cannot_be_read_are_the_only_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.with_name("device.key").chmod(0o644)
    code, refused, said = examined(path, capsys)
    assert code == 1 and "chmod 600" in refused["settings"] and said.count("\n") == 1


def test_settings_that_others_may_change_are_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.chmod(0o666)
    assert "chmod 644" in examined(path, capsys, "--no-join")[1]["files"]


def test_gpu_that_is_not_there_is_refused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused = examined(ready(tmp_path, server, runtime__device="cuda"), capsys, "--no-join")[1]
    assert "finds no GPU for runtime.device=cuda" in refused["device"]


def test_model_that_does_not_fit_is_not_loaded(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlr.client.device_checks.weight_bytes", lambda settings: 10**15)
    _, refused, said = examined(path, capsys, "--no-join")
    assert list(refused) == ["memory"] and "ok      model" not in said


def test_ledger_that_is_missing_or_changed_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = load_settings(path).ledger_path
    kept = file.read_bytes()
    file.write_bytes(kept.replace(b'"epsilon":6.0', b'"epsilon":7.0'))
    assert "the file was changed" in examined(path, capsys, "--no-join")[1]["ledger"]
    file.unlink()
    assert "not an unspent budget" in examined(path, capsys, "--no-join")[1]["ledger"]


def test_terms_are_checked_and_paid_for_to_the_round(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms, settings = path.with_name("terms.json"), load_settings(path)
    terms.write_text(json.dumps(terms_tree({"num_rounds": 20})))
    said = examined(path, capsys, "--no-join", "--terms", str(terms))[2]
    rounds = int(said.split("the rest pays for ")[1].split()[0])
    book, mechanism = settings.open_ledger(), Mechanism(1.0, 1.0, 0.2, 8.0)
    assert book is not None and 1 < rounds < 20
    answers = [book.reserve(round_index, mechanism, 2, [0])[0] for round_index in range(rounds + 1)]
    assert [answer is None for answer in answers] == [True] * rounds + [False]
    code, refused, _ = examined(path, capsys, "--no-join", "--terms", str(terms))
    assert code == 1 and "does not pay for a round of tiny" in refused["ledger"]
    terms.write_text(json.dumps(terms_tree({"trainer.num_steps": 10**6})))
    assert "policy.max_steps_per_round" in examined(path, capsys, "--no-join", "--terms", str(terms))[1]["terms"]


def test_dangers_are_said_aloud(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ready(tmp_path, server, privacy__epsilon=None, policy__allow_no_privacy=True)
    said = examined(path, capsys, "--no-join")[2]
    assert "WILL ACCEPT training without noise" in said and "may reveal its data" in said


def test_clock_outside_the_window_is_refused(server: Server, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.ahead = timedelta(seconds=-600)
    assert "set it (NTP)" in examined(path, capsys, "--no-join")[1]["clock"]
    now = datetime.now(UTC)
    assert "behind" in clock_text(now + timedelta(seconds=299), now)
    for seconds in (301, -6):
        with pytest.raises(InputError, match="-300 to"):
            clock_text(now + timedelta(seconds=seconds), now)


def test_server_that_cannot_be_trusted_or_reached_is_refused(
    server: Server, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text()
    write_certificates(tmp_path / "others", ["localhost"])
    path.write_text(text.replace(str(server.folder), str(tmp_path / "others")))
    assert "not signed by this device's root certificates" in examined(path, capsys)[1]["server"]
    path.write_text(text.replace("localhost", "127.0.0.1"))
    assert "names other hosts" in examined(path, capsys)[1]["server"]
    path.write_text(text.replace(f"localhost:{server.port}", "localhost:1"))
    assert "Nothing listens" in examined(path, capsys)[1]["server"]


def test_key_is_known_once_it_is_enrolled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with superlink(tmp_path / "server") as running:
        ca = str(tmp_path / "server" / "ca.crt")
        where = {"address": running.address, "root_certificates": ca, "private_key": "device.key"}
        device_settings(tmp_path / "device", server=where)
        path = tmp_path / "device" / "client.yaml"
        assert list(examined(path, capsys)[1]) == ["key"]
        control = SuperLink(running.address, tmp_path / "server" / "ca.crt")
        (node_id,) = register(control, [path.with_name("device.key.pub").read_text()])
        for _ in range(2):  # it leaves nothing behind
            code, refused, said = examined(path, capsys)
            assert (code, refused) == (0, {}) and f"knows this key as node {node_id}" in said


def test_server_that_is_none_of_a_federation_does_not_know_the_key(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, refused, _ = examined(path, capsys)
    assert code == 1 and list(refused) == ["key"]


def test_ledger_is_made_once_and_never_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = client_yaml(tmp_path / "device")
    file = load_settings(path).ledger_path
    assert init([str(path)]) == 0
    assert f"{file.parent.stat().st_mode:o}"[-3:] == "700" and f"{file.stat().st_mode:o}"[-3:] == "600"
    kept = file.read_bytes()
    assert init([str(path)]) == 2 and file.read_bytes() == kept
    assert "Expected no ledger" in capsys.readouterr().err
    file.unlink()
    (file.parent / "experiments").mkdir()
    assert init([str(path)]) == 2 and not file.exists()
    assert "restore the ledger" in capsys.readouterr().err


def test_ledger_command_says_what_was_spent(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = load_settings(path).open_ledger()
    assert book is not None
    book.reserve(0, Mechanism(1.0, 1.0, 0.2, 8.0), 2, [0])
    assert ledger([str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{book.spent(0)} of 6" in said and book.head() in said and "counted in full" in said
    assert ledger([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger_head"] == book.head()
    book.path.unlink()
    assert ledger([str(path)]) == 2 and "not an unspent budget" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "terms"), [(LANGUAGE, language_terms()), (PICTURES, picture_terms())])
def test_a_device_of_another_task_is_told_what_a_round_takes(
    kind: dict[str, Any], terms: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ready(tmp_path, server, **kind)
    asked = path.with_name("terms.json")
    asked.write_text(json.dumps(terms_tree(terms)))
    before = load_settings(path).ledger_path.read_bytes()
    code, refused, said = examined(path, capsys, "--no-join", "--terms", str(asked))
    assert (code, refused) == (0, {}), said
    assert "40 rows are read; a step of lora_A, lora_B was tried" in said and "GB at most" in said
    assert ("pictures of 16 x 16 pixels" in said) == (kind is PICTURES)
    assert load_settings(path).ledger_path.read_bytes() == before, "nothing is charged"
    asked.write_text(json.dumps(terms_tree({**terms, "task": {**terms["task"], "reading_sha256": "f" * 64}})))
    assert "as the server has, got" in examined(path, capsys, "--no-join", "--terms", str(asked))[1]["terms"]


def test_rows_that_are_wrong_are_named_by_number_and_never_by_what_they_say(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ready(tmp_path, server, **LANGUAGE)
    asked, chats = path.with_name("terms.json"), path.with_name("chats.jsonl")
    asked.write_text(json.dumps(terms_tree(language_terms({"max_length": 8}))))
    assert "40 of them cut to 8 tokens" in examined(path, capsys, "--no-join", "--terms", str(asked))[2]
    rows = chats.read_text().splitlines()
    rows[6] = json.dumps({"messages": [{"role": "user", "content": "the patient's secret"}]})
    chats.write_text("\n".join(rows))
    code, refused, said = examined(path, capsys, "--no-join", "--terms", str(asked))
    assert code == 1 and "row 7" in refused["data"] and "not the assistant's" in refused["data"]
    assert "row 7" in refused["round"] and "secret" not in said
