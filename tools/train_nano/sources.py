# SPDX-License-Identifier: Apache-2.0
"""Python source for training and for filler: which files, under which licence, and which are held out."""

from __future__ import annotations

import random
import re
import site
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Kept out of training; the filler of held-out exercises. Plain library modules that every CPython ships.
# fmt: off
HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse", "bdb", "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "ftplib",
    "gettext", "heapq", "imaplib", "ipaddress", "mailbox", "mimetypes", "netrc", "optparse", "pathlib",
    "pickletools", "plistlib", "poplib", "pprint", "pstats", "queue", "sched", "shelve", "shlex", "smtplib",
    "statistics", "tarfile", "textwrap", "trace", "uuid", "zipapp",
)
# fmt: on
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib)\b", re.IGNORECASE)
REFUSED = re.compile(r"GPL|MPL|Mozilla|EUPL|CC-BY|Proprietary|NVIDIA|Commercial", re.IGNORECASE)
MAX_FILE_BYTES = 300_000


@dataclass(frozen=True)
class Package:
    """A package whose source may be used.

    Attributes:
        name: distribution name.
        licence: the licence its metadata states.
        files: its Python files.
    """

    name: str
    licence: str
    files: tuple[Path, ...]


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_files() -> list[Path]:
    """Returns the held-out standard library files that this Python has, in a fixed order."""
    candidates = [_stdlib() / f"{name}.py" for name in HELD_OUT_MODULES]
    candidates += [_stdlib() / name / "__init__.py" for name in HELD_OUT_MODULES]
    return sorted(path for path in candidates if path.is_file())


def _licence(dist: metadata.Distribution) -> str:
    meta = dist.metadata
    stated = [meta.get("License-Expression") or ""]
    stated += [value for value in meta.get_all("Classifier") or [] if value.startswith("License ::")]
    stated.append((meta.get("License") or "").strip().splitlines()[0] if meta.get("License") else "")
    return "; ".join(dict.fromkeys(text for text in stated if text))


def permissive_packages() -> list[Package]:
    """Returns the installed packages with a permissive licence, the standard library first."""
    root = _stdlib()
    held_out = set(held_out_files())
    own = tuple(
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts
        and "dist-packages" not in path.parts
        and path not in held_out
        and path.parent.name not in HELD_OUT_MODULES
    )
    packages = [Package("python-standard-library", "PSF-2.0", own)]
    folders = {*site.getsitepackages(), sysconfig.get_paths()["purelib"]}
    for dist in sorted(metadata.distributions(path=sorted(folders)), key=lambda d: d.metadata["Name"] or ""):
        licence = _licence(dist)
        if not PERMISSIVE.search(licence) or REFUSED.search(licence):
            continue
        names = [file for file in dist.files or () if file.suffix == ".py" and ".." not in file.parts]
        files = tuple(Path(str(dist.locate_file(file))) for file in sorted(names, key=str))
        packages.append(Package(dist.metadata["Name"], licence, files))
    return packages


def read_source(path: Path) -> str | None:
    """Returns a file's text, or None where it is not plain, reasonably sized source."""
    try:
        if not 200 < path.stat().st_size <= MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if max(map(len, text.splitlines())) > 400 or "<|" in text:
        return None
    return "\n" + text.strip().replace("\r", "")


def iter_sources(packages: list[Package], limit_bytes: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (package name, text) in a random order until `limit_bytes` of text have passed."""
    files = [(package.name, path) for package in packages for path in package.files]
    random.Random(seed).shuffle(files)
    total = 0
    for name, path in files:
        text = read_source(path)
        if text is None:
            continue
        yield name, text
        total += len(text)
        if total >= limit_bytes:
            return


def short_functions(text: str, min_chars: int = 90, max_chars: int = 260) -> list[str]:
    """Returns the short functions of a source text, dedented, with the name replaced by `@@`.

    Functions with empty lines inside are left out: an empty line marks a quoted function's end.
    """
    found: list[str] = []
    lines = text.split("\n")
    for start, line in enumerate(lines):
        head = re.match(r"( *)def ([A-Za-z]\w*)\(", line)
        if not head:
            continue
        indent = head.group(1)
        end = start + 1
        while end < len(lines) and lines[end].startswith(indent + " "):
            end += 1
        body = "\n".join(part[len(indent) :].rstrip() for part in lines[start:end])
        if end - start > 1 and min_chars <= len(body) <= max_chars and body.isascii():
            found.append(body.replace(f"def {head.group(2)}(", "def @@(", 1))
    return found
