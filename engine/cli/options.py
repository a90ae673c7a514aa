"""Flags that several subcommands share, and what they stand for."""

from __future__ import annotations

import argparse

from engine.client import BlockingClient
from engine.errors import InvalidRequest, PeerUnavailable
from engine.modes import (
    DEFAULT_DRAFT_WEIGHTS,
    DEFAULT_WEIGHTS,
    KV_MODES,
    SPECULATION_MODES,
    WEIGHT_MODES,
)
from engine.sampling_params import SamplingParams
from engine.state import read_up_state, state_dir


def add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    parser.add_argument("--max-tokens", type=int, help="output tokens at most (default: what fits)")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="default %(default)s"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--frequency-penalty", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--n", type=int, default=1, help="choices")
    parser.add_argument("--min-tokens", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="may be given several times")
    parser.add_argument("--stop-token-id", type=int, action="append", default=[])
    parser.add_argument("--include-stop", action="store_true")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--logprobs", type=int, help="log-probabilities of this many top tokens")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Raises InvalidRequest naming what is out of range."""
    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        n=options.n,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_id),
        include_stop=options.include_stop,
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a name or a path (default: smollm2, or what is served)")
    parser.add_argument("--weights", choices=WEIGHT_MODES)
    parser.add_argument("--kv", choices=KV_MODES)
    parser.add_argument(
        "--speculate",
        choices=SPECULATION_MODES,
        help="guess tokens and verify them; it changes none",
    )
    parser.add_argument(
        "--draft", help="model (default: the same one) or head (default: the packaged) that drafts"
    )
    parser.add_argument("--draft-weights", choices=WEIGHT_MODES, help="its weights")


def add_place(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--local", action="store_true", help="in this process, without services")
    place.add_argument(
        "--endpoint",
        metavar="HOST:PORT[,...]",
        help="decode services; a stream that loses one goes on at another",
    )


def open_engine(options: argparse.Namespace) -> BlockingClient:
    """The engine the flags ask for: in this process, at an endpoint, or what ``quire up`` runs."""
    if options.draft and options.speculate not in ("auto", "model", "head"):
        raise InvalidRequest("--draft", "nobody drafts", "--speculate auto, model or head")
    if options.draft_weights and options.speculate != "model":
        raise InvalidRequest("--draft-weights", "no model drafts", "--speculate model")
    if options.local:
        from engine.local import LocalEngine
        from engine.progress import default_progress

        return LocalEngine(
            options.model or "smollm2",
            weights=options.weights or DEFAULT_WEIGHTS,
            kv=options.kv,
            progress=default_progress(),
            speculate=options.speculate or "off",
            draft=options.draft or "",
            draft_weights=options.draft_weights or DEFAULT_DRAFT_WEIGHTS,
        )
    if (options.weights, options.kv, options.speculate) != (None, None, None):
        raise InvalidRequest(
            "--weights, --kv and --speculate", "a running service has its own", "only with --local"
        )
    from engine.remote import RemoteEngine

    return RemoteEngine(decode_endpoints(options.endpoint), model=options.model or "")


def decode_endpoints(endpoint: str | None) -> list[str]:
    """The endpoints given between commas, or the decode services that ``quire up`` runs.

    Raises PeerUnavailable if there is none.
    """
    given = [each.strip() for each in (endpoint or "").split(",") if each.strip()]
    if given:
        return given
    state = read_up_state(state_dir())
    endpoints = state.endpoints("decode") if state else []
    if not endpoints:
        raise PeerUnavailable(
            "no decode service is known: start one with `quire up`, "
            "give --endpoint HOST:PORT, or use --local"
        )
    return endpoints
