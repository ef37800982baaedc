"""Takes single files out of tar archives whose digests have been checked."""

import shutil
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from dataprep import DataPrepError
from dataprep.checksums import REFETCH


def unpack(archive: Path, wanted: Mapping[str, Path]) -> None:
    """Write some members of a tar archive to files; no name in the archive becomes a path.

    Args:
        archive: a tar file, compressed or not. It is read as far as the last wanted member.
        wanted: for the name of each member, without a leading "./", the file to write, in a folder
            that exists.

    Raises:
        DataPrepError: the archive is damaged, or lacks a wanted file.
        OSError: a file cannot be written.
    """
    missing = dict(wanted)
    try:
        with tarfile.open(archive, "r|*") as tar:
            while missing and (member := tar.next()):
                name = member.name.removeprefix("./")
                if name in missing and member.isreg() and (content := tar.extractfile(member)):
                    with missing.pop(name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataPrepError(f"{archive} is damaged ({error}). {REFETCH}") from error
    if missing:
        raise DataPrepError(
            f"{archive} does not hold {', '.join(missing)}: it is not the archive that was "
            "expected. Put the published one there."
        )
