"""Makes the token function's test vectors: ``python make_token_vectors.py``.

A second implementation of what ``kernels.sample`` defines, in plain Python: integers,
``decimal`` for logarithms, and floats rounded to fp32 by ``struct`` after every operation. Sums,
products and quotients of two fp32 numbers may be computed in fp64 first: rounding twice gives what
rounding once gives (Figueroa, "When is double rounding innocuous?", 1995). It shares nothing with
the package, and follows the definitions word by word where the package is quick.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from decimal import Decimal, getcontext
from pathlib import Path

HERE = Path(__file__).parent
LARGEST = (2 - 2**-23) * 2.0**127
LOG_COEFFICIENTS = [
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
]
EXP_COEFFICIENTS = [
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
]
FLOAT = struct.Struct("<f")
INT = struct.Struct("<I")


def fp32(x):
    """The fp32 number nearest to ``x``, ties to even."""
    try:
        return FLOAT.unpack(FLOAT.pack(x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def bits_of(x):
    return INT.unpack(FLOAT.pack(x))[0]


def clip(x):
    return min(max(x, -LARGEST), LARGEST)


# -- noise


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (product1 >> 32) ^ c[1] ^ k[0],
            product1 % 2**32,
            (product0 >> 32) ^ c[3] ^ k[1],
            product0 % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def word(seed, position, choice_index, token_id):
    block = philox((token_id // 4, position, choice_index, 0), (seed % 2**32, seed >> 32))
    return block[token_id % 4]


def log1(f, e):
    z = fp32(f * f)
    y = fp32(LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        y = fp32(fp32(y * f) + fp32(coefficient))
    y = fp32(y * f)
    y = fp32(y * z)
    y = fp32(y + fp32(e * fp32(-2.12194440e-4)))
    y = fp32(y + fp32(z * -0.5))
    r = fp32(f + y)
    return fp32(r + fp32(e * 0.693359375))


def split(v):
    m, e = math.frexp(v)
    if bits_of(m) < 0x3F3504F3:
        m, e = 2 * m, e - 1
    return m - 1, e


def gumbel(x):
    if x >= 3037000500:
        f, e = fp32(2 * (2**32 - 1 - x) + 1) * -(2.0**-33), 0
    else:
        f, e = split(fp32(2 * x + 1))
        e -= 33
    return -log1(*split(-log1(f, e)))


# -- choice


def mass(x):
    if x < -23:
        return 0
    n = math.floor(fp32(fp32(x * fp32(1.44269504088896341)) + 0.5))
    x = fp32(x - fp32(n * 0.693359375))
    x = fp32(x - fp32(n * fp32(-2.12194440e-4)))
    y = fp32(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = fp32(fp32(y * x) + fp32(coefficient))
    y = fp32(y * fp32(x * x))
    y = fp32(fp32(y + x) + 1)
    return int(y * 2**60) >> (28 - n)


def log_softmax(logits):
    getcontext().prec = 40
    highest = max(logits)
    total = math.fsum(math.exp(v - highest) for v in logits)
    log_total = Decimal(total).ln() + Decimal(highest)
    return [fp32(float(Decimal(v) - log_total)) if v > -math.inf else v for v in logits]


def adjust(logits, params, prompt_ids, output_ids):
    logits = list(logits)
    for token_id, bias in params.get("logit_bias", {}).items():
        logits[int(token_id)] = fp32(logits[int(token_id)] + fp32(bias))
    repetition = max(fp32(params.get("repetition_penalty", 1.0)), 2.0**-126)
    for token_id in {*prompt_ids, *output_ids}:
        v = logits[token_id]
        logits[token_id] = fp32(v / repetition) if v > 0 else fp32(v * repetition)
    for token_id, count in Counter(output_ids).items():
        frequency = fp32(fp32(params.get("frequency_penalty", 0.0)) * count)
        v = fp32(logits[token_id] - frequency)
        logits[token_id] = fp32(v - fp32(params.get("presence_penalty", 0.0)))
    return [clip(v) for v in logits]


def may_be_chosen(params, vocab_size, num_output, eos_ids):
    ids = set(params.get("allowed_token_ids", range(vocab_size)))
    ids -= set(params.get("banned_token_ids", []))
    if num_output < params.get("min_tokens", 0):
        ids -= set(params.get("stop_token_ids", []))
        ids -= set() if params.get("ignore_eos") else set(eos_ids)
    return ids


def filter_ids(values, params):
    if params.get("min_p"):
        border = fp32(max(values.values()) + fp32(math.log(params["min_p"])))
        values = {i: v for i, v in values.items() if v >= border}
    if params.get("top_k"):
        border = sorted(values.values(), reverse=True)[: params["top_k"]][-1]
        values = {i: v for i, v in values.items() if v >= border}
    if params.get("top_p", 1.0) < 1:
        values = filter_top_p(values, params["top_p"])
    return values


def filter_top_p(values, top_p):
    highest = max(values.values())
    counts = Counter(values.values())
    masses = {v: counts[v] * mass(fp32(v - highest)) for v in counts}
    enough = top_p * float(sum(masses.values()))
    kept, mass_before = set(), 0
    for v in sorted(counts, reverse=True):
        if mass_before < enough:
            kept.add(v)
        mass_before += masses[v]
    return {i: v for i, v in values.items() if v in kept}


def choose(case, logits):
    params, output_ids = case["params"], case["output_ids"]
    ids = may_be_chosen(params, len(logits), len(output_ids), case["eos_ids"])
    adjusted = adjust(logits, params, case["prompt_ids"], output_ids)
    values = {i: adjusted[i] for i in sorted(ids) if logits[i] > -math.inf}
    temperature = params.get("temperature", 1.0)
    if temperature < 1e-5:
        return max(values, key=lambda i: (values[i], -i))
    values = {i: clip(fp32(v / fp32(temperature))) for i, v in values.items()}
    values = filter_ids(values, params)
    position = len(case["prompt_ids"]) + len(output_ids)
    scores = {
        i: fp32(v + gumbel(word(case["seed"], position, case["choice_index"], i)))
        for i, v in values.items()
    }
    return max(scores, key=lambda i: (scores[i], -i))


def solve(case, logits):
    token_id = choose(case, logits)
    solved = {**case, "token_id": token_id}
    num_top = case["params"].get("logprobs")
    if num_top is not None:
        logprobs = log_softmax(logits)
        best = sorted(range(len(logits)), key=lambda i: (-logprobs[i], i))[:num_top]
        solved["logprob"] = logprobs[token_id]
        solved["top_logprobs"] = [[i, logprobs[i]] for i in best]
    return solved


# -- vectors

LOGITS = {
    "steps": [(i * 7 % 24) / 4 - 3 for i in range(24)],
    "ties": [[2.0, 1.5, 2.0, -1.0, 0.0, 1.5][i % 6] for i in range(24)],
    "fine": [fp32(math.sin(i * 1.7) * 6) for i in range(24)],
    "wide": [fp32(math.cos(i * 2.3) * 40) for i in range(24)],
    "flat": [0.25] * 24,
}
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 0.000009},
    {"temperature": 0.00001},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.7},
    {"temperature": 0.0, "banned_token_ids": [0, 2, 7, 17], "logprobs": 0},
    {"temperature": 0.0, "logit_bias": {"5": 100.0, "6": -100.0}, "logprobs": 5},
    {},
    {"temperature": 0.7, "logprobs": 20},
    {"temperature": 1.9},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 2147483647},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.9999999999},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 12, "top_p": 0.8},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.3},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 100.0, "presence_penalty": -2.0},
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.9},
    {"presence_penalty": 0.3, "frequency_penalty": -0.4, "repetition_penalty": 1.1},
    {"logit_bias": {"0": 4.5, "3": -2.25, "23": 0.1}, "temperature": 0.6},
    {"allowed_token_ids": [1, 4, 9, 16]},
    {"allowed_token_ids": [1, 4, 9, 16], "banned_token_ids": [4], "top_p": 0.6},
    {"min_tokens": 3, "stop_token_ids": [3, 10], "temperature": 0.4},
    {"min_tokens": 9, "stop_token_ids": [3, 10, 17], "temperature": 0.0},
    {"min_tokens": 9, "ignore_eos": True, "temperature": 0.0, "allowed_token_ids": [17, 0, 10]},
    {
        "temperature": 1.2,
        "top_p": 0.95,
        "top_k": 15,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"2": 1.5, "11": 2.0},
        "banned_token_ids": [8],
        "min_tokens": 6,
        "logprobs": 4,
    },
]
CONTEXTS = [
    {"seed": 0, "choice_index": 0, "prompt_ids": [1], "output_ids": []},
    {
        "seed": 2**64 - 1,
        "choice_index": 3,
        "prompt_ids": [4, 9, 2, 2],
        "output_ids": [7, 7, 17, 23, 7],
    },
]
BIG_VOCAB = 49_152
BIG_PARAMS = [
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0},
    {"temperature": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.8, "top_k": 40, "logprobs": 2},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.9, "min_p": 0.001, "top_k": 1000, "top_p": 0.7},
]


def big_logit(token_id, salt, shift):
    """A number of 16 bits, scaled by a power of two: exact in fp32."""
    return (((token_id * 2654435761 + salt) % 2**32 >> 16) - 32768) / 2**shift


def noise_vectors():
    edges = [0, 1, 2**31, 3037000499, 3037000500, 2**32 - 2**26, 2**32 - 2, 2**32 - 1]
    around_root_half = list(range(3037000500 - 10_000, 3037000500 + 10_000, 97))
    words = edges + around_root_half + [word(5, n, 0, 0) for n in range(200)]
    places = [
        (seed, position, choice_index, token_id)
        for seed in (0, 1, 2**32, 0x0123456789ABCDEF, 2**64 - 1)
        for position in (0, 1, 31, 4095, 2**31)
        for choice_index in (0, 1, 63)
        for token_id in (0, 1, 2, 3, 4, 49_151, 2**20 - 1)
    ]
    return {
        "columns": {
            "words": ["word", "bits of g"],
            "places": ["seed", "position", "choice index", "token id", "word", "bits of g"],
        },
        "words": [[x, bits_of(gumbel(x))] for x in words],
        "places": [[*place, word(*place), bits_of(gumbel(word(*place)))] for place in places],
    }


def choice_vectors():
    cases = [
        solve({"logits": name, "params": params, "eos_ids": [0, 17], **context}, LOGITS[name])
        for name in LOGITS
        for params in PARAMS
        for context in CONTEXTS
    ]
    return {"logits": LOGITS, "cases": cases}


def big_choice_vectors():
    cases = []
    for number, params in enumerate(BIG_PARAMS):
        salt, shift = 1000 * number + 1, 11 + number % 2
        case = {
            "salt": salt,
            "shift": shift,
            "params": params,
            "eos_ids": [0],
            "seed": 77 + number,
            "choice_index": number,
            "prompt_ids": list(range(40)),
            "output_ids": [5, 49_151],
        }
        cases.append(solve(case, [big_logit(i, salt, shift) for i in range(BIG_VOCAB)]))
    return {
        "vocab_size": BIG_VOCAB,
        "formula": "(((id * 2654435761 + salt) mod 2^32 >> 16) - 32768) / 2^shift",
        "cases": cases,
    }


FILES = {
    "gumbel.json": noise_vectors,
    "token_choices.json": choice_vectors,
    "token_choices_49152.json": big_choice_vectors,
}


def as_text(vectors):
    """JSON with one vector a line."""
    parts = []
    for key, value in vectors.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(item) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    for name, make in FILES.items():
        (HERE / name).write_text(as_text(make()))
