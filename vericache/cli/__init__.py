# SPDX-License-Identifier: Apache-2.0
"""The command line: generate, compare, models, compressors."""

from vericache.cli.app import main

__all__ = ["main"]
