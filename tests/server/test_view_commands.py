"""`fedlr server view`, `watch` and `adapter` as an operator uses them: what they print, survive and refuse.

Mutants this file kills: a hash or size that nobody compares; a download in place, or one that leaves a part; a watch
that never tries again, tries for ever, or begins anew; a proxy between; a second view on the same port; a terminal
that obeys.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.flower.addresses import host_and_port
from fedlr.server.view import commands
from fedlr.server.view.commands import adapter, view, watch
from fedlr.server.view.connection import ViewAddress
from fedlr.server.view.download import write_adapter
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2 import AdapterHeader, AdapterPart, AskedClient, Round, RunStatus
from fedlr.server.view.serving import serve
from fedlr.server.view.watching import Patience, round_line, status_line
from tests.server.view_on_loopback import Certificates, RunWriter, new_certificates, shown, token_file

ROOT = Path(__file__).parents[2]
VIEW = "import sys; from fedlr.server.view.commands import view; sys.exit(view(sys.argv[1:]))"
CONTENT = bytes(range(256)) * 9000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return new_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    (tmp_path / "run" / "adapters").mkdir(parents=True)
    (tmp_path / "run" / "adapters" / "round-00002.safetensors").write_bytes(CONTENT)
    return RunWriter(tmp_path / "run")


@pytest.fixture
def address(run: RunWriter, certificates: Certificates) -> Iterator[ViewAddress]:
    with shown(run.path, certificates) as address:
        yield address


def caller(address: ViewAddress, folder: Path) -> list[str]:
    """Arguments that let a command in."""
    return [str(address), "--token-file", str(token_file(folder)), *(["--ca", str(address.ca)] if address.ca else [])]


@pytest.mark.parametrize("which", ["2", "latest"])
def test_an_adapter_arrives_byte_for_byte(
    which: str, address: ViewAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serving.safetensors"
    out.write_bytes(b"the one before")
    to, *rest = caller(address, tmp_path)
    assert adapter(["get", to, which, "--out", str(out), *rest]) == 0
    assert out.read_bytes() == CONTENT
    printed = capsys.readouterr()
    assert printed.out == SHA256 + "\n" and "round 2, 2304000 bytes, layout released" in printed.err


HEADER = AdapterPart(header=AdapterHeader(rounds_completed=2, size_bytes=len(CONTENT), sha256=SHA256))
DAMAGE = {
    "no header": ([AdapterPart(chunk=CONTENT)], "begins with its header"),
    "nothing": ([], "begins with its header"),
    "flipped bit": ([HEADER, AdapterPart(chunk=b"\1" + CONTENT[1:])], "SHA-256"),
    "chunks swapped": ([HEADER, AdapterPart(chunk=CONTENT[7:]), AdapterPart(chunk=CONTENT[:7])], "SHA-256"),
    "cut short": ([HEADER, AdapterPart(chunk=CONTENT[:-1])], "2304000 bytes, got 2303999"),
    "endless": ([HEADER, *[AdapterPart(chunk=CONTENT)] * 9], "2304000 bytes, got 4608000"),
    "huge": ([AdapterPart(header=AdapterHeader(size_bytes=1 << 60))], "bytes of room"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_stream_leaves_the_file_as_it_was(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "serving.safetensors"
    out.write_bytes(b"the one before")
    parts, message = DAMAGE[damage]
    with pytest.raises(InputError, match=message):
        write_adapter(iter(parts), out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_a_run_is_followed_to_its_end(
    run: RunWriter, address: ViewAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.configure(num_rounds=2)
    run.round(0)
    run.clients(1, client_8="budget_exhausted")
    run.metrics(1, num_refused=1)
    run.end()
    assert watch(caller(address, tmp_path)) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("ward, fedsvd: round 1 of 2, epsilon 0.50, last written 2")
    assert lines == [
        "round 0/2   accuracy 0.000   before training",
        "round 1/2   accuracy 0.100   epsilon 0.50 (median 0.25)   trained 1 of 2   refused 8 (budget_exhausted)",
        "the run has ended",
    ]
    assert watch([*caller(address, tmp_path), "--from-round", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_watching_goes_on_where_it_was_when_the_view_was_killed(
    run: RunWriter, certificates: Certificates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.configure()
    run.round(0)
    run.round(1)
    with process(run, certificates, tmp_path, port=0) as (first, port):
        address = ViewAddress("127.0.0.1", port, commands.read_token(token_file(tmp_path)), certificates.ca)
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(watch(caller(address, tmp_path))))
        thread.start()
        printed = wait_for("round 1/3", capsys)
        first.kill()
        wait_for("is gone", capsys)
    run.round(2)
    with process(run, certificates, tmp_path, port=port):
        printed += wait_for("round 2/3", capsys)
        run.round(3)
        run.end()
        thread.join(30)
    printed += capsys.readouterr().out
    assert codes == [0]
    assert [line[:9] for line in printed.splitlines() if line.startswith("round")] == [f"round {n}/3" for n in range(4)]


def test_watching_ends_when_the_view_stays_away(
    run: RunWriter,
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "Patience", lambda: Patience(first_s=0.01, num_tries=3))
    run.round(0)
    codes: list[int] = []
    with shown(run.path, certificates) as address:
        thread = threading.Thread(target=lambda: codes.append(watch(caller(address, tmp_path))))
        thread.start()
        wait_for("round 0", capsys)
    thread.join(30)
    said = capsys.readouterr().err
    assert codes == [2] and said.count("trying again") == 3 and "go on with --from-round 1" in said


def test_what_a_caller_did_wrong_is_one_line(
    run: RunWriter, address: ViewAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = new_certificates(tmp_path / "other")
    to, *rest = caller(address, tmp_path)
    wrong_token = str(token_file(tmp_path, secret="f" * 40))
    localhost = f"localhost:{address.port}"  # the certificate is for 127.0.0.1
    with shown(run.path) as plain:
        for arguments, message in [
            ([to, *rest[:1], wrong_token, *rest[2:]], "use the --token-file that the view was started with"),
            ([to, *rest[:3], str(other.ca)], f"a certificate that {other.ca} did not sign"),
            ([to, *rest[:2]], "does it use TLS (--ca)?"),
            ([localhost, *rest], "a certificate for another host name"),
            ([str(plain), *rest], "plain text; start the view with --certificate"),
            (["127.0.0.1:1", *rest], "is it running"),
            (["127.0.0.1", *rest], "Expected HOST:PORT"),
            ([to, *rest[:3], str(tmp_path / "none.crt")], "Expected --ca to be a file"),
            ([to, *rest, "--from-round", "-1"], "Expected --from-round"),
            ([to], "--token-file"),
        ]:
            assert watch(arguments) == 2
            said = capsys.readouterr().err
            assert message in said and said.count("\n") == 1, said


def test_an_adapter_that_is_not_there_leaves_no_file(
    address: ViewAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, *rest = caller(address, tmp_path)
    out = tmp_path / "x.safetensors"
    assert adapter(["get", to, "7", "--out", str(out), *rest]) == 2
    assert "got no adapter of round 7: the run has those of rounds 2" in capsys.readouterr().err
    assert adapter(["get", to, "first", "--out", str(out), *rest]) == 2
    assert adapter(["put", to, "7", "--out", str(out), *rest]) == 2
    assert adapter(["get", to, "2", "--out", str(tmp_path / "none" / "x"), *rest]) == 2
    assert not list(tmp_path.glob("*x.safe*"))


def test_a_view_is_refused_before_it_listens(
    run: RunWriter, address: ViewAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = ["--token-file", str(token_file(tmp_path))]
    for arguments, message in [
        ([str(run.path)], "--token-file"),
        ([str(run.path), *token, "--host", "0.0.0.0"], "an address that is not loopback, got '0.0.0.0'"),
        ([str(run.path / "none"), *token], "Expected a run directory"),
        ([str(run.path), *token, "--key", str(tmp_path / "k")], "--certificate and --key together"),
    ]:
        assert view(arguments) == 2
        assert message in capsys.readouterr().err
    kept = {"token": address.token, "credentials": None, "limits": Limits(), "stop": threading.Event()}
    with pytest.raises(InputError, match="is the port taken"):
        serve(run.path, host="127.0.0.1", port=address.port, started=lambda _: None, **kept)  # type: ignore[arg-type]


def test_the_token_goes_through_no_proxy(
    run: RunWriter, address: ViewAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    run.round(0)
    run.end()
    assert watch(caller(address, tmp_path)) == 0


def test_a_line_shows_many_clients_briefly_and_obeys_none() -> None:
    cohort = [AskedClient(client_id=n, status="rejected", reason="no_answer") for n in range(9)]
    cohort.append(AskedClient(client_id=9, status="refused", reason="\x1b[2J"))
    line = round_line(Round(rounds_completed=7, num_rejected=9, num_refused=1, cohort=cohort), num_rounds=0)
    shown_clients = "refused 9 (?[2J)   rejected 0, 1, 2, 3, 4, and 4 more (no_answer)"
    assert line == f"round 7   no privacy   trained 0 of 10   {shown_clients}"


def test_nothing_is_said_of_privacy_before_the_first_line() -> None:
    assert status_line(RunStatus()) == "a run without a configuration yet: round 0"
    assert status_line(RunStatus(name="ward", num_rounds=5)) == "ward: round 0 of 5"
    assert ", before training, last written" in status_line(RunStatus(name="ward", last_line_unix_s=1.0))
    assert ", no privacy, last" in status_line(RunStatus(name="ward", rounds_completed=1, last_line_unix_s=1.0))


@pytest.mark.parametrize("text", ["", "host", ":8470", "host:", "host:x", "host:70000", "::1:8470", "https://host:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Expected HOST:PORT"):
        host_and_port(text)


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Wait until a text was printed; return what was printed to the output since the last look."""
    seen, heard = "", ""
    for _ in range(600):
        new = capsys.readouterr()
        seen, heard = seen + new.out, heard + new.err
        if text in seen + heard:
            return seen
        threading.Event().wait(0.05)
    raise AssertionError(f"{text!r} is not in {seen + heard!r}")


@contextmanager
def process(
    run: RunWriter, certificates: Certificates, folder: Path, *, port: int
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The command itself, in a process of its own; yield it and its port."""
    certificate, key = map(str, certificates.pair)
    options = ["--port", str(port), "--certificate", certificate, "--key", key]
    command = [sys.executable, "-c", VIEW, str(run.path), "--token-file", str(token_file(folder)), *options]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ))
    assert started.stdout is not None
    with started:
        try:
            line = started.stdout.readline()
            assert line.startswith(f"{run.path} is shown on 127.0.0.1:") and line.endswith(" (TLS)\n")
            yield started, int(line.split(":")[-1].split()[0])
        finally:
            started.terminate()
        assert started.wait(20) in (0, -signal.SIGKILL)
