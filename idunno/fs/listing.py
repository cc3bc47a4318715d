# idunno/fs/listing.py: directories, of which the store knows nothing: names are flat, '/' is a character in them.
#
# Rule 1: a directory is there while a file lies below it.
# Rule 2: one question per page of a listing, never one per file; what lies deeper than asked for is skipped, not fetched.
# Rule 3: the system's own files below .idunno/ do not exist here.
from __future__ import annotations

from datetime import datetime
from typing import Any, Final, TypeAlias

from idunno.sdfs.client import FileClient
from idunno.sdfs.messages import FileInfo, ListRow, VersionRow

Info: TypeAlias = dict[str, Any]
"""What fsspec says of an entry: name, size in bytes, type; of a file also version, and created = mtime in s since 1970."""

HIGHEST: Final = "\U0010ffff"
"""No name that a person chooses goes on with it, so DIRECTORY/HIGHEST stands behind all that is in DIRECTORY."""


def hidden(path: str) -> bool:
    return path == ".idunno" or path.startswith(".idunno/")


def file_entry(name: str, row: ListRow | FileInfo | VersionRow) -> Info:
    seconds = datetime.fromisoformat(row.created).timestamp()
    return {
        "name": name,
        "size": row.size,
        "type": "file",
        "version": row.version,
        "created": seconds,
        "mtime": seconds,  # pyarrow's name for it
    }


def directory_entry(name: str) -> Info:
    return {"name": name, "size": 0, "type": "directory"}


async def look(files: FileClient, path: str, timeout_s: float) -> Info | None:
    """What `path` is, None when it is nothing. A file hides a directory of the same name."""
    if path == "":
        return directory_entry("")
    if hidden(path):
        return None
    found = (await files.ls_page(path, limit=1, timeout_s=timeout_s)).files
    if found and found[0].name == path:  # the shortest name with this prefix comes first
        return file_entry(path, found[0])
    if found and not found[0].name.startswith(f"{path}/"):  # PATH-x and PATH.x come before PATH/x
        found = (await files.ls_page(f"{path}/", limit=1, timeout_s=timeout_s)).files
    return directory_entry(path) if found else None


async def below(files: FileClient, path: str, depth: int | None, timeout_s: float) -> dict[str, Info]:
    """Files and directories below the directory `path`, down to `depth` levels (None: all), by name."""
    entries: dict[str, Info] = {}
    if hidden(path):
        return entries
    prefix = f"{path}/" if path else ""
    after = ""
    while True:
        page = await files.ls_page(prefix, after, timeout_s=timeout_s)
        for row in page.files:
            parts = row.name[len(prefix) :].split("/")
            for level in range(1, min(len(parts), depth + 1 if depth is not None else len(parts))):
                directory = prefix + "/".join(parts[:level])
                if directory not in entries:
                    entries[directory] = directory_entry(directory)
            if depth is None or len(parts) <= depth:
                # A file of the same name as a directory is shown as the file, as `look` does.
                entries[row.name] = file_entry(row.name, row)
        if not page.more or not page.files:
            return dict(sorted(entries.items()))
        after = page.files[-1].name
        parts = after[len(prefix) :].split("/")
        if depth is not None and len(parts) > depth:
            after = max(after, prefix + "/".join(parts[:depth]) + "/" + HIGHEST)
