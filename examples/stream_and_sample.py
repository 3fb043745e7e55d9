# SPDX-License-Identifier: Apache-2.0
"""Sampled text streams too, and is as reproducible as greedy text."""

from vericache import LLM, SamplingParams

llm = LLM("vericache-nano", mode="vericache", compressor="kivi:bits=2")
params = SamplingParams(max_tokens=64, temperature=0.8, top_p=0.95, seed=7)

text = ""
for chunk in llm.stream("def fibonacci(n):", params):
    print(chunk.text, end="", flush=True)
    text += chunk.text
print()

again = llm.generate(["def fibonacci(n):"], params)[0]
print(f"the same a second time: {again.text == text}")
