# SPDX-License-Identifier: Apache-2.0
"""Training of vericache-nano, the small Llama model that ships with the repository."""
