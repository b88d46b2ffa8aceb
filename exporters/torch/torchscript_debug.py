"""Take the exporting machine's source paths out of a TorchScript archive.

torch stores the file and line of every traced operation beside the code (``*.debug_pkl``), and has
no option not to. They name folders of the machine that exported, and nothing reads them to run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["drop_source_paths"]

DEBUG_SUFFIX = ".debug_pkl"


def drop_source_paths(path: Path) -> None:
    """Remove the debug records of the archive at ``path``, in place.

    An archive is a zip file whose weights stand before its code, so that only what follows the
    first debug record is written again.
    """
    with zipfile.ZipFile(path, "a") as archive:
        entries = archive.infolist()
        debug = [entry for entry in entries if entry.filename.endswith(DEBUG_SUFFIX)]
        if not debug:
            return
        first = entries.index(debug[0])
        rest = [entry for entry in entries[first:] if entry not in debug]
        assert not any("/data/" in entry.filename for entry in rest), "weights come before code"
        kept = [(entry, archive.read(entry)) for entry in rest]
        for entry in entries[first:]:
            archive.filelist.remove(entry)
            del archive.NameToInfo[entry.filename]
        assert archive.fp is not None
        archive.start_dir = debug[0].header_offset  # where it appends
        archive.fp.seek(debug[0].header_offset)
        archive.fp.truncate()
        for entry, content in kept:
            archive.writestr(entry.filename, content, compress_type=entry.compress_type)
