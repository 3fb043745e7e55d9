# SPDX-License-Identifier: Apache-2.0
"""The engine: requests, step planning, fetching, verification and acceptance."""
