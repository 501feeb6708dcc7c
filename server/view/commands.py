"""`fedlr server view`, `watch` and `adapter`: show a run to those who hold the token, and look at it from afar."""

import signal
import sys
import threading
from pathlib import Path

from fedlr.errors import InputError
from fedlr.flower.addresses import host_and_port
from fedlr.runs.commands import Options, command
from fedlr.server.view.access import Token, read_token, server_credentials
from fedlr.server.view.connection import ViewAddress
from fedlr.server.view.download import download_adapter
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2 import Layout, RunStatus
from fedlr.server.view.serving import is_readable, serve
from fedlr.server.view.watching import Patience, round_line, status_line, watch_run

PORT = 8470
LATEST = "latest"


@command
def view(arguments: list[str]) -> None:
    """Show a run: fedlr server view RUN_DIR --token-file FILE [--host ADDRESS --port N --certificate FILE --key FILE]

    Reads the run directory only, so it may start before the server and outlives it. Ends on Ctrl-C or SIGTERM.
    --token-file   the secret of all callers: one word of 32 or more characters, mode 0600
    --host         127.0.0.1 unless given; every address but loopback needs --certificate and --key
    --port         8470 unless given; 0 takes a free one
    --certificate  of `fedlr server certificate` (server.crt), with its --key (server.key, mode 0600)
    """
    options = Options()
    options.add_argument("run_dir", type=Path)
    options.add_argument("--token-file", type=Path, required=True)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=PORT)
    options.add_argument("--certificate", type=Path)
    options.add_argument("--key", type=Path)
    chosen = options.parse_args(arguments)
    if not is_readable(chosen.run_dir):
        raise InputError(f"Expected a run directory (outputs/NAME/TIME), got {str(chosen.run_dir)!r}")
    token = read_token(chosen.token_file)
    credentials = server_credentials(chosen.host, chosen.certificate, chosen.key)
    kind = "TLS" if credentials else "plain text on loopback"

    def started(port: int) -> None:
        print(f"{chosen.run_dir} is shown on {chosen.host}:{port} ({kind})", flush=True)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    serve(
        chosen.run_dir,
        host=chosen.host,
        port=chosen.port,
        token=token,
        credentials=credentials,
        limits=Limits(),
        started=started,
        stop=stop,
    )


@command
def watch(arguments: list[str]) -> None:
    """Follow a run: fedlr server watch HOST:PORT --token-file FILE [--ca FILE] [--from-round N]

    Prints a line a round: those that are over, then each as it ends; ends with the run. When the view goes away, it
    is tried again for some ten minutes.
    --ca          ca.crt of the server; without it loopback is plain text, and others are checked as websites are
    --from-round  leave out the rounds before; 0 unless given, the start before any training
    """
    options = caller_options()
    options.add_argument("--from-round", type=int, default=0)
    chosen = options.parse_args(arguments)
    if not 0 <= chosen.from_round < 2**31:
        raise InputError(f"Expected --from-round to be 0 or more, got {chosen.from_round}")
    address = view_address(chosen.address, chosen.token_file, chosen.ca)
    num_rounds = 0
    for news in watch_run(address, from_round=chosen.from_round, patience=Patience(), say=warn):
        if isinstance(news, RunStatus):
            num_rounds = news.num_rounds
            print(status_line(news), flush=True)
        else:
            print(round_line(news, num_rounds=num_rounds), flush=True)
    print("the run has ended")


@command
def adapter(arguments: list[str]) -> None:
    """Fetch an adapter: fedlr server adapter get HOST:PORT ROUND --out FILE --token-file FILE [--ca FILE]

    Prints its SHA-256. FILE appears, or is replaced, only when all of it has arrived and has the announced hash.
    ROUND    how many rounds were completed, or latest: of a run that has ended, the one that PEFT loads
    --ca     ca.crt of the server; without it loopback is plain text, and others are checked as websites are
    """
    if arguments[:1] != ["get"]:
        raise InputError(
            f"Expected adapter get, got {' '.join(['adapter', *arguments[:1]])!r}; --help shows the options"
        )
    options = caller_options()
    options.add_argument("round")
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args(arguments[1:])
    if chosen.round != LATEST and not (chosen.round.isdecimal() and int(chosen.round) < 2**31):
        raise InputError(f"Expected the number of a round or {LATEST}, got {chosen.round!r}")
    rounds_completed = None if chosen.round == LATEST else int(chosen.round)
    header = download_adapter(view_address(chosen.address, chosen.token_file, chosen.ca), rounds_completed, chosen.out)
    layout = Layout.Name(header.layout).removeprefix("LAYOUT_").lower()
    warn(f"round {header.rounds_completed}, {header.size_bytes} bytes, layout {layout}: {chosen.out}")
    print(header.sha256)


def caller_options() -> Options:
    """Return the options of all commands that ask a view."""
    options = Options()
    options.add_argument("address")
    options.add_argument("--token-file", type=Path, required=True)
    options.add_argument("--ca", type=Path)
    return options


def view_address(address: str, token_file: Path, ca: Path | None) -> ViewAddress:
    """Return the address that a command line names."""
    host, port = host_and_port(address)
    token: Token = read_token(token_file)
    return ViewAddress(host, port, token, ca)


def warn(line: str) -> None:
    """Print to the error stream: the output keeps only what was asked for."""
    print(line, file=sys.stderr, flush=True)
