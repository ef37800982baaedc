"""Takes single files out of tar archives that may be damaged, or made to do harm.

An archive is read once, from its beginning to its end, and what its headers say decides nothing
but which bytes belong to which member: the names in it never become paths, and neither disk nor
memory is filled beyond limits that are known before.
"""

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from dataprep import DataPrepError
from dataprep.checksums import REFETCH

# WMT'14's UN texts, 2.4 GB compressed, are the most; text shrinks to a quarter, or a third.
MAX_BYTES = 16 * 1024**3

# tarfile keeps the headers before a member in memory, and some versions of it parse them in
# quadratic time. Ordinary members have one or two kilobytes.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS_BYTES = 16 * 1024**2  # of all members together

_GZIP_MAGIC = b"\x1f\x8b"
_NAMES_SHOWN = 5

# What tarfile raises for headers that are damaged, or made to do harm.
_BAD_HEADERS = (tarfile.TarError, ValueError, IndexError)


def unpack(archive: Path, wanted: Mapping[str, Path], max_bytes: int = MAX_BYTES) -> None:
    """Write some members of a tar archive to files; all of them appear, or none.

    Args:
        archive: a tar file, compressed by gzip or not.
        wanted: for the name of each member, without a leading "./", the file to write. The folders
            of the files exist.
        max_bytes: how much may come out of the decompressor, headers and other members included.

    Raises:
        DataPrepError: the archive is damaged, lacks a wanted member or has it twice or as
            something else than a file, unpacks to more than it may, or has names that lead out of
            it; or a file cannot be written.
    """
    staged = {name: path.with_name(f".partial-{path.name}") for name, path in wanted.items()}
    try:
        _stage(archive, staged, max_bytes)
        for name, path in wanted.items():
            os.replace(staged[name], path)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _stage(archive: Path, wanted: Mapping[str, Path], max_bytes: int) -> None:
    """Write members where they do no harm if the rest of the archive turns out to be bad."""
    seen: list[str] = []
    written: set[str] = set()
    try:
        with archive.open("rb") as stream:
            for tar, member in _members(_Metered(stream, archive, max_bytes)):
                name = _checked_name(member, archive)
                seen.append(name)
                if name in written:
                    raise _refusal(archive, f"it holds {_shown(name)} twice")
                if name in wanted:
                    _write(tar, member, wanted[name], archive)
                    written.add(name)
    except _BAD_HEADERS as error:
        raise _damage(archive, error) from error
    except OSError as error:  # those of writing have been dealt with
        raise DataPrepError(f"{archive} cannot be read ({error.strerror}). {REFETCH}") from error
    missing = [name for name in wanted if name not in written]
    if missing:
        there = ", ".join(map(_shown, seen[:_NAMES_SHOWN])) or "nothing"
        raise DataPrepError(
            f"{archive} does not hold {', '.join(missing)}: it is not the archive that was "
            f"expected. Among its {len(seen):,} members are {there}. Put the published one there."
        )


class _Metered:
    """Decompresses an archive, and ends in an error when more comes out than is expected.

    Attributes:
        archive: the archive, for sentences.
        count: how many bytes have come out.
        expected: how many may come out, by what its headers have said so far.
    """

    def __init__(self, stream: BinaryIO, archive: Path, max_bytes: int) -> None:
        """Begin to read.

        Args:
            stream: the archive's bytes.
            archive: its path.
            max_bytes: how much may come out in all.
        """
        self.archive = archive
        self.count = 0
        self.expected = 0
        self._max_bytes = max_bytes
        compressed = stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        stream.seek(0)
        # tarfile would undo the compression too, but does not compare the checksum at the end.
        self._stream = gzip.GzipFile(fileobj=stream) if compressed else stream

    def read(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            DataPrepError: there are too many, or they cannot be decompressed.
        """
        try:
            chunk = self._stream.read(size)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise _damage(self.archive, error) from error
        self.count += len(chunk)
        self.refuse_beyond(self.count)
        if self.count > self.expected:
            raise _refusal(self.archive, "there is more between its files than headers need")
        return chunk

    def refuse_beyond(self, count: int) -> None:
        """Refuse an archive out of which so many bytes are to come.

        Raises:
            DataPrepError: they are more than there may be.
        """
        if count > self._max_bytes:
            raise _refusal(self.archive, f"it unpacks to more than {self._max_bytes:,} bytes")


def _members(stream: _Metered) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member, while its data can be read; then what is left of the stream is read.

    Raises:
        DataPrepError: there is more than there may be, or it cannot be decompressed.
        Exception: one of `_BAD_HEADERS`.
    """
    data, end = 0, 0  # the bytes in files so far; where the last member ends
    stream.expected = MAX_HEADER_BYTES
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|", encoding="utf-8") as tar:
        for member in iter(tar.next, None):
            # Kept for random access, they would fill the memory; so would global headers, and they
            # say nothing of members.
            vars(tar)["members"].clear()
            vars(tar)["pax_headers"].clear()
            if member.issparse():
                raise _refusal(stream.archive, f"{_shown(member.name)} in it is a sparse file")
            if member.size < 0:
                raise ValueError("negative size")
            stream.refuse_beyond(member.offset_data + member.size)
            size = member.size if member.isreg() else 0  # what others say means nothing
            data, end = data + size, member.offset_data + size
            stream.expected = min(end + MAX_HEADER_BYTES, data + MAX_HEADERS_BYTES)
            yield tar, member
    stream.expected = data + MAX_HEADERS_BYTES
    while stream.read(MAX_HEADER_BYTES):  # padding, and then the checksum
        pass


def _checked_name(member: tarfile.TarInfo, archive: Path) -> str:
    """The name of a member without a leading "./".

    Raises:
        DataPrepError: the name would lead somewhere else if it were a path.
    """
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise _refusal(archive, f"{_shown(member.name)} in it would lie outside of it")
    return name


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, archive: Path) -> None:
    """Write a member's data to a file.

    Raises:
        DataPrepError: the member is no file, or the file cannot be written.
        Exception: one of `_BAD_HEADERS`.
    """
    source = tar.extractfile(member) if member.isreg() else None
    if source is None:
        raise _refusal(archive, f"{_shown(member.name)} in it is not a file")
    try:
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise DataPrepError(
            f"{path} cannot be written ({error.strerror}): {member.size:,} bytes are needed there."
        ) from error


def _refusal(archive: Path, reason: str) -> DataPrepError:
    return DataPrepError(
        f"{archive} is refused: {reason}. Delete it and fetch it from a place that you trust."
    )


def _damage(archive: Path, error: Exception) -> DataPrepError:
    return DataPrepError(f"{archive} is damaged ({error}). {REFETCH}")


def _shown(name: str) -> str:
    """A name fit for the terminal: short, and without characters that control it."""
    return repr(name if len(name) <= 100 else f"{name[:100]}...")
