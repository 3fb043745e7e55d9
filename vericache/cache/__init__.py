# SPDX-License-Identifier: Apache-2.0
"""Where KV lies: page geometry, tails and resident pages, draft caches, the full store on the host."""
