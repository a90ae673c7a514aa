"""Every gRPC channel and server option, with its reason."""

from __future__ import annotations

from typing import Final, Literal

Options = tuple[tuple[str, int], ...]
Purpose = Literal["control", "pages"]

MAX_CONTROL_MESSAGE_BYTES: Final = 4 << 20
MAX_PAGES_MESSAGE_BYTES: Final = 16 << 20

_KEEPALIVE: Final[Options] = (
    # A peer that is frozen or cut off is noticed after 1 s of silence plus 2 s without an answer.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    # The time-out that decides: left alone it is 60 s, whatever keepalive_timeout_ms says.
    ("grpc.http2.ping_timeout_ms", 2000),
    # A prompt can be in the queue for long without any message: keep pinging.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

_CHANNEL: Final[Options] = (
    *_KEEPALIVE,
    # A retry needs an attempt number, so it is made above gRPC or not at all.
    ("grpc.enable_retries", 0),
    # Channels to one address share a connection unless told otherwise; then pages that fill the
    # connection's window would hold up control messages.
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that was restarted at its address is found again at once: left alone, the pauses
    # between attempts to connect grow to two minutes, in which every call fails.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # The time one attempt may take, in spite of its name: a frozen peer accepts and says nothing.
    ("grpc.min_reconnect_backoff_ms", 2000),
)

SERVER_OPTIONS: Final[Options] = (
    *_KEEPALIVE,
    # Without this two servers may listen on one port, and requests reach the forgotten one.
    ("grpc.so_reuseport", 0),
    # Clients that ping more often are sent away with too_many_pings; ours ping every second.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.max_receive_message_length", MAX_CONTROL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_PAGES_MESSAGE_BYTES),
    # Bit 0, identity, only: a small compressed message must not unfold into a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)


def channel_options(purpose: Purpose) -> Options:
    """Options of a client's channel; only one for pages takes messages as large as pages."""
    limit = MAX_PAGES_MESSAGE_BYTES if purpose == "pages" else MAX_CONTROL_MESSAGE_BYTES
    return (
        *_CHANNEL,
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", MAX_CONTROL_MESSAGE_BYTES),
    )
