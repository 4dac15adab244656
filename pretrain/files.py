"""Files that are whole at any moment: readers, kills and power cuts see the old one or the new."""

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = "tmp."  # begins the name of what is being written


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`replace_text` with sorted keys."""
    replace_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes text to disk beside `path`, then moves it there."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
