"""This process as the ServerApp of a Flower run: it starts the run at the SuperLink, takes its task, and holds a Grid.

Flower would install the app from a bundle and start it in a process of its own; here the process that holds the method
and its checkpoints is the app, so nothing is installed at run time and no code travels. The bundle that Flower insists
on holds names only. Everything here speaks to the SuperLink's Control and Runtime interfaces, which belong on the
server's own machine (docs/operator.md); the calls below Flower's public ones are pinned by
tests/server/test_live_federation.py.
"""

import fcntl
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedlr import __version__
from fedlr.config.schema import DeploymentSection
from fedlr.errors import InputError
from fedlr.server.reply_grid import ReplyGrid

COMPLETED, FAILED = "completed", "failed"
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
MANIFEST = f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "fedlr"
version = "{__version__}"
description = "Names only: server and devices run what is installed on them"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedlr"
[tool.flwr.app.components]
serverapp = "fedlr.server.app:app"
clientapp = "fedlr.client.app:app"
"""


class LinkLost(Exception):
    """The SuperLink is away, ended the run, or does not know it any more: start another, and go on where it was."""


@contextmanager
def flower_run(deployment: DeploymentSection, *, patience_s: float = 60.0) -> Iterator[ReplyGrid]:
    """Start a Flower run and yield its Grid; the run ends with the block.

    Raises:
        InputError: the SuperLink does not accept us, or we do not trust it; the text says what to change.
        LinkLost: it cannot be reached now, or, from within the block, the run is over there.
    """
    certificates, secret = _read(deployment, "root_certificates"), _read(deployment, "superexec_secret")
    control = ControlHttpClient.from_server_address(
        deployment.superlink, False, certificates, interceptors=[RuntimeVersionHttpInterceptor("flwr CLI")]
    )
    with naming_link(deployment), starting_alone(deployment):
        run_id = control.StartRun(StartRunRequest(fab=fab_to_proto(_bundle()))).run_id
        token = _acquire(deployment, certificates, secret, run_id, patience_s=patience_s)
    grid = ReplyGrid(deployment.superlink, False, certificates, token=token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    outcome = FAILED
    try:
        heartbeat.start()
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        with losing_link():
            yield grid
        outcome = COMPLETED
    except (RunNotRunningException, httpx.HTTPError) as error:
        raise LinkLost(type(error).__name__) from error
    finally:
        if heartbeat.is_running:
            heartbeat.stop()
        _end(grid, control, run_id, outcome)


@contextmanager
def losing_link() -> Iterator[None]:
    """Tell a person's interrupt from Flower's, which sends SIGINT where the SuperLink refuses the run's token.

    Raises:
        LinkLost: it does, as one that lost its database.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        cause: BaseException | None = interrupt
        while cause is not None and not _is_refused_token(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise LinkLost("HTTP 401: it does not know this run any more") from interrupt


def _is_refused_token(error: BaseException) -> bool:
    """Say whether it is what Flower interrupts for: at 502 to 504 it waits, and a person may interrupt the wait."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED


def _acquire(
    deployment: DeploymentSection, certificates: bytes, secret: bytes, run_id: int, *, patience_s: float
) -> str:
    """Return the token of the run's task; tasks of runs that an earlier process left behind are taken and dropped."""
    client = RuntimeHttpClient.from_server_address(
        deployment.superlink,
        False,
        certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor("SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}),
        ],
    )
    deadline = time.monotonic() + patience_s
    try:
        while time.monotonic() < deadline:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if found.HasField("task") and found.token and found.task.run_id == run_id:
                return str(found.token)
            time.sleep(0.1)
    finally:
        client.close()
    raise InputError(
        f"Expected the task of a new run from the SuperLink {deployment.superlink} within {patience_s:g} s, got none; "
        "start it with --isolation process, and let no other flower-superexec run beside it"
    )


def _end(grid: ReplyGrid, control: ControlHttpClient, run_id: int, outcome: str) -> None:
    """Tell the SuperLink that the run is over, as far as it listens."""
    grid._retry_invoker.max_tries = 1
    try:
        grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=""))
        if outcome != COMPLETED:
            control.StopRun(StopRunRequest(run_id=run_id))
    except (httpx.HTTPError, RunNotRunningException, RuntimeError):
        pass  # it is gone, and so is the run
    finally:
        grid.close()
        control.close()


@contextmanager
def starting_alone(deployment: DeploymentSection) -> Iterator[None]:
    """Let one server at a time start a run and take its task: the SuperLink hands any task to whoever asks first.

    The lock is on the secret that all who may take tasks hold; a task that another run left is then of a dead one.
    """
    with Path(deployment.superexec_secret).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def naming_link(deployment: DeploymentSection) -> Iterator[None]:
    """Say which SuperLink did not answer, and what to look at."""
    where = f"deployment.superlink={deployment.superlink}"
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise InputError(
            f"Expected {where} to accept this server, got HTTP {error.response.status_code}; is the file of "
            "deployment.superexec_secret the one the SuperLink was started with?"
        ) from error
    except httpx.HTTPError as error:
        text = str(error)[:120]
        if not isinstance(error, httpx.TransportError) or "certificate" in text.lower() or "ssl" in text.lower():
            raise InputError(
                f"Expected a SuperLink at {where} that deployment.root_certificates vouches for, got "
                f"{type(error).__name__}: {text}"
            ) from error
        raise LinkLost(f"nothing answers at {where}: {type(error).__name__}") from error


def _bundle() -> Fab:
    content, _ = build_fab_from_files({"pyproject.toml": MANIFEST.encode(), "README.md": b"fedlr\n"})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def _read(deployment: DeploymentSection, key: str) -> bytes:
    path = Path(getattr(deployment, key))
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Expected deployment.{key} to be a readable file, got {path}: {error.strerror}") from error
