# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: run them from the repository's root, as `python -m bench.NAME`."""
