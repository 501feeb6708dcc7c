"""The three calls of operator.proto, answered from a run directory."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from fedlr.server.view.adapter_files import open_adapter
from fedlr.server.view.limits import Limits
from fedlr.server.view.operator_pb2 import AdapterPart, GetAdapterRequest, Round, RunStatus, StatusRequest, WatchRequest
from fedlr.server.view.operator_pb2_grpc import OperatorViewServicer
from fedlr.server.view.round_feed import RoundFeed
from fedlr.server.view.run_status import run_status

ROUNDS_A_TURN = 16


class OperatorView(OperatorViewServicer):
    """Answers from the files of one run."""

    def __init__(self, run_dir: Path, limits: Limits) -> None:
        self._run_dir, self._limits = run_dir, limits

    def Status(self, request: StatusRequest, context: grpc.ServicerContext) -> RunStatus:
        """Say which run this is and how far it has come."""
        return run_status(self._run_dir)

    def Watch(self, request: WatchRequest, context: grpc.ServicerContext) -> Iterator[Round]:
        """Send every round from `from_round` on, and end with the run."""
        feed = RoundFeed(self._run_dir, from_round=request.from_round)
        try:
            ended = False
            while context.is_active() and not ended:
                ended = feed.has_ended()
                while rounds := feed.read(ROUNDS_A_TURN, ended=ended):
                    yield from rounds
                if not ended:
                    time.sleep(self._limits.poll_s)
        finally:
            feed.close()

    def GetAdapter(self, request: GetAdapterRequest, context: grpc.ServicerContext) -> Iterator[AdapterPart]:
        """Send the header of an adapter, then its bytes."""
        wanted = request.rounds_completed if request.HasField("rounds_completed") else None
        header, file = open_adapter(self._run_dir, wanted)
        with file:
            yield AdapterPart(header=header)
            while chunk := file.read(self._limits.chunk_bytes):
                yield AdapterPart(chunk=chunk)
