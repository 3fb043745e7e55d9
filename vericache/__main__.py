# SPDX-License-Identifier: Apache-2.0
"""`python -m vericache` is the command line."""

import sys

from vericache.cli import main

sys.exit(main())
