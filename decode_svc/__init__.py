"""The decode service: pages in, tokens out. Imports nothing of prefill_svc."""
