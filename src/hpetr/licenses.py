"""The licences of everything that hpetr runs with, read from what is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Kind = Literal["permissive", "weak copyleft", "strong copyleft", "other"]
# What developers install; nothing of it is needed to run hpetr.
NOT_AT_RUN_TIME = {"dev", "docs"}
# In this order: LGPL and AGPL contain GPL.
KINDS: tuple[tuple[str, Kind], ...] = (
    (r"AGPL|Affero", "strong copyleft"),
    (r"LGPL|Lesser|MPL|Mozilla|EPL|CDDL|EUPL", "weak copyleft"),
    (r"GPL.*(exception|WITH)", "permissive"),  # GCC's run-time libraries: programs that use them stay free
    (r"GPL|General Public", "strong copyleft"),
    (
        r"Apache|MIT|BSD|ISC|PSF|Python|Zlib|CC0|BSL-1|Boost|HPND|Unlicense|LLVM-exception|Public Domain",
        "permissive",
    ),
)
# Shared libraries of others that wheels carry, and that their packages' own licences do not speak of.
CARRIED = {
    **dict.fromkeys(("x264", "x265", "xvidcore"), "GPL-2.0-or-later"),
    **dict.fromkeys(("avcodec", "avformat", "avutil", "avfilter", "avdevice", "swscale", "swresample"), "LGPL"),
    **dict.fromkeys(("gnutls", "asound", "mp3lame", "quadmath"), "LGPL"),
    **dict.fromkeys(("gmp", "nettle", "hogweed", "unistring"), "LGPL-3.0-or-later or GPL-2.0-or-later"),
    **dict.fromkeys(("gfortran", "gomp", "gcc_s"), "GPL-3.0-or-later with GCC's exception"),
}
LIBRARY = re.compile(rf"(?:lib)?({'|'.join(CARRIED)})(?:[-.\d][^/]*)?\.(?:so|dylib|dll)")


@dataclass(frozen=True)
class PackageLicense:
    """An installed package.

    Attributes:
        needed_for: "hpetr", or the extra that brings it.
        license: as its metadata states it; "not stated" where it does not.
        carried: shared libraries in it that have another licence of the copyleft kinds: name and licence.
    """

    name: str
    version: str
    needed_for: str
    license: str
    carried: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> Kind:
        """Of the package's own licence; "other" is for people to look at."""
        return kind_of(self.license)


def kind_of(license_text: str) -> Kind:
    """The kind of a licence's name or SPDX expression; of alternatives the freest counts, of several all."""
    order: tuple[Kind, ...] = ("permissive", "weak copyleft", "other", "strong copyleft")
    alternatives = []
    for alternative in re.split(r"\s+or\s+(?!later)", license_text, flags=re.IGNORECASE):
        parts = re.split(r"\s+and\s+|;", alternative, flags=re.IGNORECASE)
        alternatives.append(max((_kind_of_one(part) for part in parts), key=order.index))
    return min(alternatives, key=order.index)


def _kind_of_one(name: str) -> Kind:
    return next((kind for pattern, kind in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def installed_licenses() -> list[PackageLicense]:
    """hpetr's run-time dependencies, and theirs, that are installed, by name; those of its extras too."""
    own = metadata.distribution("hpetr")
    extras = sorted(set(own.metadata.get_all("Provides-Extra") or []) - NOT_AT_RUN_TIME)
    found: dict[str, PackageLicense] = {}
    for extra in ("", *extras):
        for package in _tree("hpetr", frozenset({extra}), set()):
            name = canonicalize_name(package.metadata["Name"])
            if name not in found and name != "hpetr":
                found[name] = PackageLicense(
                    name, package.version, extra or "hpetr", _license_of(package), _carried_by(package)
                )
    return [found[name] for name in sorted(found)]


def _tree(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[metadata.Distribution]:
    """A package and all that it needs with these extras, as far as it is installed."""
    key = (canonicalize_name(name), extras)
    if key in seen:
        return
    seen.add(key)
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    yield package
    for line in package.requires or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield from _tree(needed.name, frozenset(needed.extras), seen)


def _license_of(package: metadata.Distribution) -> str:
    """The metadata's expression, else its classifiers, else its free text or the first line of its licence file."""
    values = package.metadata
    if expressions := values.get_all("License-Expression"):
        return expressions[0]
    classifiers = [c.rpartition(" :: ")[2] for c in values.get_all("Classifier") or [] if c.startswith("License ::")]
    if classifiers and classifiers != ["OSI Approved"]:
        return "; ".join(classifiers)
    lines = [line.strip() for line in "\n".join(values.get_all("License") or []).splitlines() if line.strip()]
    if lines and lines[0].upper() != "UNKNOWN":
        return lines[0][:60]
    for file in package.files or []:
        if re.search(r"(?i)(^|/)(licen[cs]e|copying)[^/]*$", str(file)):
            first = next((line.strip() for line in file.read_text().splitlines() if line.strip()), "")
            if first:
                return f"{first[:60]} (by its file {file.name})"
    return "not stated"


def _carried_by(package: metadata.Distribution) -> tuple[tuple[str, str], ...]:
    names = {match[1] for file in package.files or [] if (match := LIBRARY.match(file.name))}
    return tuple((f"lib{name}", CARRIED[name]) for name in sorted(names))


def to_look_at(packages: list[PackageLicense]) -> list[str]:
    """A line for each kind of licence that asks for more than its text to be passed on, or that nobody could tell."""
    lines = []
    for kind, meaning in (
        ("strong copyleft", "strong copyleft"),
        ("weak copyleft", "weak copyleft (of the library alone)"),
        ("other", "other or not stated"),
    ):
        named = [f"{package.name} ({package.license})" for package in packages if package.kind == kind]
        for package in packages:
            names = [name for name, license_text in package.carried if kind_of(license_text) == kind]
            if names:
                named.append(f"{package.name} carries {', '.join(names)}")
        lines.append(f"{meaning}: {'; '.join(named) or 'none'}")
    return lines
