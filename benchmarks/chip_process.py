"""The processes of `chip.py`, each asked and answered by lines, and the time that they may take."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

GREETING = 90.0  # seconds that a side's imports may take
OVER = "the time of the run was over"


class Failed(Exception):
    """Why there is no figure."""


class Clock:
    """The time that is left of a run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds that are left; 0 when the time is over."""
        return max(0.0, self.end - time.monotonic())


class Worker:
    """A process that answers each line with a line, both JSON objects, after a first line of its own.

    Attributes:
        hello: That first line; None before `greet`.
        fault: Why it cannot be asked any more; None while it can.
    """

    def __init__(self, command: Sequence[str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        self.hello: dict[str, Any] | None = None
        self.fault: str | None = None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def greet(self, clock: Clock) -> dict[str, Any]:
        """The first line, which comes when all is imported.

        Raises:
            Failed: If the process cannot do its work.
        """
        if self.fault is not None:
            raise Failed(self.fault)
        if self.hello is None:
            try:
                self.hello = self._answer(clock, GREETING)
            except Failed as reason:
                self.stop(str(reason))
                raise
        return self.hello

    def ask(self, request: dict[str, str], clock: Clock, most: float) -> dict[str, Any]:
        """The answer to a request, which may take so many seconds.

        Raises:
            Failed: If it says so, or does not come in time; then the process is ended.
        """
        if self.fault is not None:
            raise Failed(self.fault)
        if not clock.left():
            raise Failed(OVER)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # of a process that has ended, which its answer says
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer(clock, most)

    def stop(self, fault: str) -> None:
        """End the process with all that it started; ``fault`` says why to who asks it later."""
        self.fault = self.fault or fault
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(timeout=1)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # of what the process did not read any more
                    pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")  # the end

    def _answer(self, clock: Clock, most: float) -> dict[str, Any]:
        left = clock.left()
        try:
            line = self.lines.get(timeout=min(most, left))
        except queue.Empty:
            reason = OVER if left < most else f"took more than {most:.0f} s"
            self.stop(f"its process was ended before: {reason}")
            raise Failed(reason) from None
        if not line:
            self.stop("its process had ended")
            raise Failed(f"its process ended with status {self.process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer
