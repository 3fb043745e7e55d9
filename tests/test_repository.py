# SPDX-License-Identifier: Apache-2.0
"""The repository's face: licences stated, links alive, tables that say what the results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("*.py", "*.pyi", "*.h", "*.cpp", "*.cu", "*.cuh", "*.cmake", "*.sh")
FOLDERS = ("vericache", "csrc", "tests", "bench", "tools", "examples", "third_party")


def test_every_source_states_its_licence() -> None:
    missing = []
    for folder in FOLDERS:
        for pattern in SOURCES:
            for path in (ROOT / folder).rglob(pattern):
                head = path.read_text().splitlines()[:3]
                if head and not any("SPDX-License-Identifier: Apache-2.0" in line for line in head):
                    missing.append(str(path.relative_to(ROOT)))
    assert not missing
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    dead = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not dead
    folders = re.findall(r"`((?:vericache|csrc|tests|bench|docs|examples|tools)/[\w./-]*\w)`", text)
    assert not [name for name in folders if not (ROOT / name).exists()]


def test_readme_tables_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.fill(text) == text, "run `make tables`"
    assert set(tables.WRITERS) == {match["name"] for match in tables.MARKER.finditer(text)}


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    marker = "<!-- table: exactness.json -->\n"
    assert tables.fill(text.replace(marker, marker + "a stale line\n")) != text.replace(
        marker, marker + "a stale line\n"
    )
