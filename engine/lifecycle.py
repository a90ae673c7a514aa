"""The life of a request, in one enum: it labels spans, metrics, log lines and handover records."""

from __future__ import annotations

from enum import StrEnum


class Lifecycle(StrEnum):
    ADMIT = "admit"  # limits, deadline, tokenization
    QUEUE = "queue"  # waiting for pages in the decode pool
    CHOOSE = "choose"  # from where the prompt's pages come
    PULL = "pull"  # cached pages on their way from whoever holds them
    PREFILL_QUEUE = "prefill_queue"  # waiting for a step of the model that prefills
    PREFILL_CHUNK = "prefill_chunk"  # one chunk of the prompt in the model
    HANDOVER = "handover"  # pages on their way from prefill to decode
    LEAVE = "leave"  # some pages' layer group digested and announced by its owner
    LAND = "land"  # some pages' layer group copied in and verified by the receiver
    VERIFY = "verify"  # checking the commit against the pages that arrived
    EXPOSED = "exposed"  # what is left of a handover once the prompt is computed
    JOIN = "join"  # entering the running batch
    DECODE = "decode"  # making tokens
    FINISH = "finish"  # one terminal status, everything released
