# SPDX-License-Identifier: Apache-2.0
"""Every exception vericache raises on purpose; each message is one sentence naming the value and the remedy."""

from __future__ import annotations


class VericacheError(Exception):
    """Base of all."""


class InvalidRequestError(VericacheError, ValueError):
    """A request, parameter or option that cannot be served as given."""


class UnsupportedModelError(VericacheError, ValueError):
    """A model architecture or configuration field that vericache does not implement."""


class CheckpointError(VericacheError):
    """A checkpoint that is missing, truncated or inconsistent."""


class CapacityError(VericacheError):
    """Something that cannot fit the memory it was given."""


class KernelError(VericacheError, RuntimeError):
    """An op or a runtime object was called with arguments it cannot take, or the device failed."""
