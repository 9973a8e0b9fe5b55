"""What an offline run of W&B has left in its folder, read back from its file of records."""

import json
import struct
import time
from pathlib import Path


class OfflineRun:
    """The run in a folder offline-run-*. run: W&B's record; config: name -> value; history: step -> name -> value."""

    def __init__(self, folder: Path):
        from wandb.proto import wandb_internal_pb2 as messages

        self.folder = folder
        (path,) = folder.glob("*.wandb")
        deadline = time.monotonic() + 60
        while True:  # W&B's own process may write its last records after finish() has returned
            found = [messages.Record.FromString(each) for each in _records(path.read_bytes())]
            kinds = [each.WhichOneof("record_type") for each in found]
            if {"run", "exit"} <= set(kinds) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        # W&B writes the run's record anew when the backend has answered; the last one counts.
        self.run = next(each.run for each in reversed(found) if each.WhichOneof("record_type") == "run")
        self.config = {}
        self.history: dict[int, dict[str, object]] = {}
        self.summary = {}
        for each, kind in zip(found, kinds, strict=True):
            if kind in ("run", "config"):
                self.config |= _values((each.run.config if kind == "run" else each.config).update)
            elif kind == "history":
                values = _values(each.history.item)
                self.history.setdefault(int(values["_step"]), {}).update(values)
            elif kind == "summary":
                self.summary |= _values(each.summary.update)
        self.artifacts = [each.artifact for each, kind in zip(found, kinds, strict=True) if kind == "artifact"]
        self.is_ended = "exit" in kinds

    def artifact_of(self, kind: str) -> dict[str, bytes]:
        """The files of the artifact of that type: name -> content."""
        (artifact,) = [each for each in self.artifacts if each.type == kind]
        return {
            each.path: Path(each.local_path).read_bytes() if Path(each.local_path).exists() else b""
            for each in artifact.manifest.contents
        }

    def table(self, name: str) -> dict:
        """A logged wandb.Table: {"columns": ..., "data": ...}."""
        (path,) = self.folder.glob(f"files/media/table/{name}*.json")
        return json.loads(path.read_text())


def _values(items) -> dict[str, object]:
    return {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}


def _records(content: bytes):
    """The messages in a file of W&B's: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    place, message = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        message += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield message
            message = b""
