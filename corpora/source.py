"""Files of data sets: found in a folder or downloaded from their canonical address, and read piece by piece."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PIECE = 1 << 20
"""Bytes that are read, decoded or downloaded at a time."""
_DAMAGE = (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)


@dataclass(frozen=True)
class File:
    """A file of a data set.

    Args:
        name: of the unpacked file. In a folder it may also be packed, with `.gz` behind its name, or lie in an archive
            that has the name of the download.
        address: where to download it, or the archive that holds it; empty if it cannot be downloaded.
        sha256: checksum of the download, in hexadecimal digits.
        member: the file's name inside a zip archive at the address; empty if the download is the file itself.
    """

    name: str
    address: str = ""
    sha256: str = ""
    member: str = ""

    @property
    def download_name(self) -> str:
        """The name of the downloaded file in a folder."""
        return self.address.rpartition("/")[2] if self.member else self.name


@dataclass(frozen=True)
class Found:
    """A file that is there: its path, and its name inside that file if that is an archive."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.member})" if self.member else str(self.path)


def folder_of(data: str | Path | None, name: str, files: Sequence[File]) -> Path:
    """Choose the folder of a data set: the one given, or the folder `name` in the one that HFOPT_DATA names.

    Args:
        data: folder of the files.
        name: of the data set and its folder below HFOPT_DATA.
        files: what has to be there, for the message.

    Raises:
        FileNotFoundError: neither `data` nor HFOPT_DATA is given.
    """
    if data is not None:
        return Path(data)
    root = os.environ.get("HFOPT_DATA")
    if not root:
        names = ", ".join(file.name for file in files)
        how = "what is missing there is downloaded" if all(file.address for file in files) else "put them there"
        raise FileNotFoundError(
            f"{name} needs the files {names}: give their folder as data=, or set the environment variable HFOPT_DATA "
            f"to a folder that has them in its folder {name}; {how}"
        )
    return Path(root, name)


def find(folder: Path, file: File, *, download: bool = True) -> Found:
    """Find a file in a folder, plain, packed, or in its archive; download it if it is not there.

    Args:
        folder: where to look, and where a download is kept.
        file: what to look for.
        download: whether to download what is missing.

    Raises:
        FileNotFoundError: the file is missing and was not downloaded; the message says what to put where.
        ValueError: what was downloaded has another checksum.
    """
    for name in (file.name, f"{file.name}.gz"):
        if (folder / name).is_file():
            return Found(folder / name)
    kept = folder / file.download_name
    if file.member and kept.is_file():
        return Found(kept, file.member)
    if not file.address or not download:
        there = f"; it is published at {file.address}" if file.address else ""
        raise FileNotFoundError(f"there is no {file.name} in {folder}, plain or as {file.name}.gz: put it there{there}")
    fetch(file.address, kept, file.sha256)
    return Found(kept, file.member)


def fetch(address: str, path: Path, sha256: str) -> None:
    """Download a file, showing progress, and keep it only if its checksum is right.

    What has arrived is kept as `<name>.part`: after Ctrl-C or a broken connection the next call goes on from there.

    Args:
        address: what to download.
        path: where to keep it; folders are made.
        sha256: the checksum expected, in hexadecimal digits.

    Raises:
        FileNotFoundError: the address cannot be reached, or the folder cannot be written.
        ValueError: another checksum; the download is deleted.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _receive(address, part)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise FileNotFoundError(
            f"there is no {path.name} in {path.parent}, and {address} cannot be downloaded to there ({reason}): "
            f"download it in another way and put it there as {path.name}"
        ) from error
    found = digest(part)
    if found != sha256:
        part.unlink()
        raise ValueError(
            f"what {address} gave has the SHA-256 checksum {found}, but {sha256} was expected: it is another file, or "
            f"it arrived damaged, and was deleted; try again, or put {path.name} into {path.parent} yourself"
        )
    part.replace(path)


def _receive(address: str, part: Path) -> None:
    """Append what is still missing of the file at an address."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        address, headers={"User-Agent": "hfopt", "Range": f"bytes={have}-"} if have else {}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing follows what is there
            return
        raise
    with answer:
        if have and getattr(answer, "status", None) != 206:  # the server sends the whole file again
            have = 0
        length = answer.headers.get("Content-Length")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with part.open("ab" if have else "wb") as kept, Progress(*columns) as progress:
            total = have + int(length) if length else None
            task = progress.add_task(part.name.removesuffix(".part"), total=total, completed=have)
            while piece := answer.read(PIECE):
                kept.write(piece)
                progress.advance(task, len(piece))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def digest(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def pieces(found: Found | Path, most: int = 1 << 32) -> Iterator[bytes]:
    """Read a file piece by piece, unpacked if its name ends in `.gz` or `.zip`.

    Args:
        found: the file. A zip archive without a member named has a single one.
        most: bytes at most. A packed file of some MB can unpack to many GB; it is refused where that is exceeded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, truncated, no zip archive with that member, or too long.
    """
    found = Found(found) if isinstance(found, Path) else found
    count = 0
    try:
        with _opened(found) as file:
            while piece := file.read(PIECE):
                count += len(piece)
                if count > most:
                    raise ValueError(f"{found} has more than {most:,} bytes, which are the most that are read")
                yield piece
    except _DAMAGE as error:
        kind = "zip archive" if found.path.suffix == ".zip" else "gzip file"
        raise ValueError(f"{found} is no complete {kind} ({error}); fetch it again") from error
    except IsADirectoryError as error:
        raise FileNotFoundError(f"{found} is a folder; give a file") from error
    if count == 0:
        raise ValueError(f"{found} is empty; fetch it again")


def _opened(found: Found) -> BinaryIO:
    if found.path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(found.path))
    if found.path.suffix != ".zip":
        return found.path.open("rb")
    archive = zipfile.ZipFile(found.path)
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    member = found.member or (names[0] if len(names) == 1 else "")
    if member not in names:
        wanted = f"no {member}" if member else f"{len(names)} files, and a single one was expected"
        raise ValueError(f"{found.path} has {wanted}; it has {', '.join(names[:5]) or 'nothing'}")
    return cast(BinaryIO, archive.open(member))


def read(found: Found | Path, most: int = 1 << 30) -> bytes:
    """The whole of a file, as :func:`pieces` reads it."""
    return b"".join(pieces(found, most))


def texts(found: Found | Path, encoding: str = "utf-8", most: int = 1 << 32) -> Iterator[str]:
    """Decode a file piece by piece; a byte order mark at its beginning is left out.

    Raises:
        ValueError: as of :func:`pieces`; and bytes that are no text in this encoding, with their place.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    place, pending, first = 0, 0, True
    for last, piece in _with_last(pieces(found, most)):
        try:
            text = decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            at = place - pending + error.start
            raise ValueError(
                f"{found} is no {encoding.upper()} text: byte {at:,} is {error.object[error.start]:#04x} "
                f"({error.reason}); give its encoding, or convert the file"
            ) from error
        place += len(piece)
        pending = len(decoder.getstate()[0])
        if text:
            yield text.removeprefix("\ufeff") if first else text
            first = False


def _with_last(parts: Iterator[bytes]) -> Iterator[tuple[bool, bytes]]:
    """The parts, each with whether it is the last one."""
    before: bytes | None = None
    for part in parts:
        if before is not None:
            yield False, before
        before = part
    if before is not None:
        yield True, before
