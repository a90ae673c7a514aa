"""The prefill service: prompt in, pages out. No sampling. Imports nothing of decode_svc."""
