"""What every call passes before it reaches the run directory: the token, the rate, the number of streams.

Without the token a call ends before its request is read. What goes wrong inside is logged here and reaches the caller
as a code and a sentence without paths or values.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fedlr.server.view.access import Token
from fedlr.server.view.limits import Limits, RequestRate, address_of
from fedlr.server.view.refusals import NotThere, Unreadable

Answer = Callable[[Any, grpc.ServicerContext], Any]
Stream = Callable[[Any, grpc.ServicerContext], Iterator[Any]]
log = logging.getLogger(__name__)


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Admits calls one by one."""

    def __init__(self, token: Token, limits: Limits) -> None:
        self._token, self._stall_s = token, limits.stall_s
        self._rate = RequestRate(limits)
        self._streams = threading.Semaphore(limits.max_streams)

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """Return the handler of a call behind the checks, or one that refuses it at once."""
        if not self._token.matches(details.invocation_metadata):
            return grpc.stream_stream_rpc_method_handler(_refuse)  # of all kinds, the one that waits for no request
        handler = continuation(details)
        if handler is None:  # no such method
            return None
        codec = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(self._answer(handler.unary_unary), *codec)

    def _answer(self, behaviour: Answer) -> Answer:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self._check_rate(context)
            try:
                return behaviour(request, context)
            except Exception as error:
                status = explain(error)
            context.abort(*status)

        return answer

    def _stream(self, behaviour: Stream) -> Stream:
        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._check_rate(context)
            if not self._streams.acquire(blocking=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams are open; close one")
            try:
                yield from unless_stalled(behaviour(request, context), context, stall_s=self._stall_s)
                return
            except Exception as error:
                status = explain(error)
            finally:
                self._streams.release()
            context.abort(*status)

        return stream

    def _check_rate(self, context: grpc.ServicerContext) -> None:
        if not self._rate.allows(address_of(context.peer())):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests; wait some seconds")


def unless_stalled(messages: Iterator[Any], context: grpc.ServicerContext, *, stall_s: float) -> Iterator[Any]:
    """Pass messages on while the caller takes each within some seconds; else cancel the call."""
    for message in messages:
        timer = threading.Timer(stall_s, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield message  # gRPC asks for the next one when this one was sent
        finally:
            timer.cancel()


def explain(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return what a caller may know of an error; what only the operator may know is logged."""
    match error:
        case NotThere():
            return grpc.StatusCode.NOT_FOUND, str(error)
        case Unreadable():
            return grpc.StatusCode.DATA_LOSS, str(error)
        case _:
            log.error("the view could not answer", exc_info=error)
            return grpc.StatusCode.INTERNAL, "the view could not answer; its log says why"


def _refuse(_: Any, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
