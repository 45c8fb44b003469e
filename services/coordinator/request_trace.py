"""The trace of a request. The coordinator that ends the request exports the root span.

The IDs of the root span are stored with the request, so that all coordinators and workers create descendants of it. A
coordinator that takes the request over restarts the root span with the same IDs and start time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import FleetError, Unavailable
from common.rpc.status import to_status
from common.state.records import State, StateValue
from common.trace_context import (
    NO_SPAN,
    Span,
    SpanKind,
    TraceContext,
    current_span,
    entered,
    make_current,
    parse_traceparent,
)
from common.tracing import span, tracer
from fleet.v1 import generation_pb2

_NAME = "request"


def stored_span(record: generation_pb2.RequestRecord) -> Span:
    """A non-recording root span of a stored request, which adds the trace ID to log lines."""
    stored = record.trace
    own = parse_traceparent(stored.traceparent, stored.tracestate)
    return Span(own or parse_traceparent(stored.client_traceparent, stored.tracestate))


class RequestTrace:
    """The root span of a request, and its trace context for the request's record (`stored`).

    If this process exports no spans, `root` is non-recording and propagates the client's trace context.
    """

    def __init__(self, root: Span = NO_SPAN, client: TraceContext | None = None) -> None:
        self.root = root
        self._client = client

    @classmethod
    def begin(cls) -> RequestTrace:
        """Start the trace of a new request, as a child of the client's span.

        The root becomes the current span of the RPC, so that the RPC's metrics have the trace ID as exemplar.
        """
        parent = current_span()
        spans = tracer()
        root = parent if spans is None else spans.start(_NAME, SpanKind.SERVER, parent, {})
        make_current(root)
        return cls(root, parent.context)

    @classmethod
    def resume(cls, record: generation_pb2.RequestRecord) -> RequestTrace:
        """Continue the trace of a request that another coordinator admitted.

        Starts a new root span if that coordinator exported no spans.
        """
        stored, spans = record.trace, tracer()
        client = parse_traceparent(stored.client_traceparent, stored.tracestate)
        own = parse_traceparent(stored.traceparent, stored.tracestate)
        start_ns = record.created_at.ToNanoseconds()
        if spans is None:
            root = Span(own or client)
        elif own is None:
            root = spans.start(_NAME, SpanKind.SERVER, Span(client), {}, start_ns)
        else:
            root = spans.restart(_NAME, SpanKind.SERVER, client, own, start_ns)
        trace = cls(root, client)
        trace.describe(record)
        return trace

    @property
    def stored(self) -> generation_pb2.TraceContext | None:
        """The trace context that another coordinator needs to continue the trace."""
        own, client = self.root.context, self._client
        if own is None:
            return None
        is_own = own is not client
        return generation_pb2.TraceContext(
            traceparent=own.traceparent if is_own else "",
            client_traceparent="" if client is None else client.traceparent,
            tracestate=own.state,
        )

    def describe(self, record: generation_pb2.RequestRecord) -> None:
        """Set the attributes of the root span: names and sizes, but no prompts."""
        parameters = record.parameters
        self.root.set(
            request_id=record.request_id,
            model=record.model,
            variant=record.variant,
            priority=record.priority,
            height=parameters.height,
            width=parameters.width,
            num_frames=parameters.num_frames,
            num_inference_steps=parameters.num_inference_steps,
        )

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """The span of validation and admission. A refusal ends the trace; Unavailable does not."""
        try:
            with span("accept"):
                yield
        except Unavailable:
            raise
        except FleetError as error:
            self.refuse(error)
            raise

    def refuse(self, error: FleetError) -> None:
        """End the trace of a refused request."""
        self.root.fail(to_status(error).code.name)
        self.root.end()

    def replay(self, request_id: str) -> None:
        """End the trace of a replayed request, because the original request has its own trace."""
        self.root.set(replayed=request_id)
        self.root.end()

    def taken_over(self, epoch: int) -> None:
        """Record that this coordinator continues the request."""
        with entered(self.root), span("take over", epoch=epoch):
            return

    def end(self, state: StateValue, error: generation_pb2.Error | None = None, *, steps_saved: int = 0) -> None:
        """End the trace with the terminal state."""
        self.root.set(state=State.Name(state).removeprefix("REQUEST_STATE_"), steps_saved=steps_saved)
        if error is not None:
            self.root.fail(error.code)
        elif state == State.REQUEST_STATE_EXPIRED:
            self.root.fail("DEADLINE_EXCEEDED")
        self.root.end()
