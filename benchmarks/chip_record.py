"""The figures of a chip, in a file of its own, which is written after each of them."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import chip_report
from chip_plan import Part


class Record:
    """The measurements of a chip by part and contender.

    Attributes:
        chip: Its name, as JAX has it.
        file: Where they are.
        content: What is in the file.
        run: When this run began, which says what was timed in turn.
        waiting: Contenders that are ready and have no figure yet.
    """

    def __init__(self, docs: Path, chip: str) -> None:
        self.chip, self.docs = chip, docs
        self.file = docs / "chips" / f"{re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-')}.json"
        self.content: dict[str, Any] = {"chip": chip, "measurements": {}}
        if self.file.is_file():
            self.content = json.loads(self.file.read_text(encoding="utf-8"))
        self.run = datetime.now(UTC).isoformat(timespec="seconds")
        self.waiting: dict[str, dict[str, Any]] = {}

    def ready(self, part: Part, contender: str, known: dict[str, Any]) -> None:
        """Keep what is known of a contender that is ready; its first figure replaces those of earlier runs."""
        measured = {"contender": contender, **part.settings, "run": self.run, **known}
        self.waiting[key(part, contender)] = {**measured, "turns": [], "seconds": []}

    def add(self, part: Part, contender: str, turn: int, seconds: float) -> None:
        """Add the time of a run in a turn."""
        where = key(part, contender)
        measurements = self.content["measurements"]
        if where in self.waiting:
            measurements[where] = self.waiting.pop(where)
        measurements[where]["turns"].append(turn)
        measurements[where]["seconds"].append(seconds)
        self._write()

    def note(self, part: Part, contender: str, reason: str) -> None:
        """Keep why a contender has no figure, or no further one; figures that it has stay."""
        where = key(part, contender)
        measurements = self.content["measurements"]
        if not measurements.get(where, {}).get("seconds"):
            measurements[where] = {"contender": contender, **part.settings, "run": self.run, "not_run": reason}
        elif measurements[where]["run"] == self.run:
            measurements[where]["stopped"] = reason
        self._write()

    def is_whole(self, part: Part) -> bool:
        """Whether every contender of a part has a figure."""
        measurements = self.content["measurements"]
        return all(measurements.get(key(part, name), {}).get("seconds") for name in part.contenders)

    def faults(self) -> list[str]:
        """What failed in this run; that PyTorch or PEFT is not installed is no fault."""
        found = []
        for where, one in self.content["measurements"].items():
            reason = one.get("not_run") or one.get("stopped")
            if reason and one["run"] == self.run and not re.search("No module named '(torch|peft)'", reason):
                found.append(f"{where}: {reason}")
        return found

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        whole.replace(self.file)
        chip_report.write(self.docs)


def key(part: Part, contender: str) -> str:
    """Where a contender's measurement is."""
    return f"{part.name}: {contender}"
