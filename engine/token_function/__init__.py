"""The token function: which token follows, as a pure function of logits, request and tokens.

In this order, all in fp32:

1. log-probabilities, from the raw logits (``logprobs``)
2. masks: ``allowed_token_ids``, ``banned_token_ids``, and before ``min_tokens`` the
   end-of-sequence and stop ids (``choose``); a masked id stays out whatever comes later
3. ``logit_bias``, then repetition, frequency and presence penalties (``penalties``)
4. temperature 0: the highest logit, ties to the lowest id, and done
5. division by the temperature, then min_p, top_k, top_p (``filters``)
6. the highest ``fp32(logit + g(id))``, ties to the lowest id (``gumbel``), where ``g`` comes from
   word ``id % 4`` of Philox4x32-10 with the seed as key and the counter
   ``(id // 4, position, choice index, 0)`` (``philox``); ``position`` is the index of the token
   being chosen in prompt + output

Steps 3 and 5 keep finite logits finite: after the penalties and after the division, what overflows
becomes the largest number of its sign. A repetition penalty below 2^-126 counts as 2^-126.

Imports neither torch, grpc nor redis.
"""

from engine.token_function.choose import TokenChoice, TokenFunction

__all__ = ["TokenChoice", "TokenFunction"]
