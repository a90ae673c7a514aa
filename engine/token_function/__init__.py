"""The token function: which token follows, as a pure function of logits, request and tokens.

``rules`` says what sampling parameters mean, ``kernels.sample`` what is computed, bit for bit:

1. log-probabilities, from the raw logits
2. masks: ``allowed_token_ids``, ``banned_token_ids``, and before ``min_tokens`` the
   end-of-sequence and stop ids
3. ``logit_bias``, then repetition, frequency and presence penalties
4. temperature 0: the highest logit, and done
5. division by the temperature, then min_p, top_k, top_p
6. the highest sum of logit and noise, the noise of an id being a function of seed, position, choice
   index and id

``choose`` asks it for all rows of a step at once. Imports neither torch, grpc nor redis.
"""

from engine.token_function.choose import TokenChoice, TokenFunction, choose, chosen

__all__ = ["TokenChoice", "TokenFunction", "choose", "chosen"]
