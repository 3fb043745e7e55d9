# SPDX-License-Identifier: Apache-2.0
"""The promise: a compressed cache drafts, the full one verifies, every token is the same."""

from pathlib import Path

from vericache import LLM, SamplingParams

prompt = (Path(__file__).parent / "tool_call_4k.txt").read_text()
params = SamplingParams(max_tokens=160)

full = LLM("vericache-nano", mode="full").generate([prompt], params)[0]
llm = LLM("vericache-nano", mode="vericache", compressor="snapkv:ratio=0.25", draft_len=30)
ours = llm.generate([prompt], params)[0]

print(ours.text)
print(f"identical to full KV: {ours.token_ids == full.token_ids}")
stats = ours.stats
kib = stats.fetched_bytes_per_token / 1024
print(f"{stats.accepted_per_round:.1f} tokens a round, {kib:.0f} KiB fetched a token")
