"""Real servers and workers, as processes of the command."""

from __future__ import annotations

import pathlib
import re
import signal
import subprocess
import threading
from typing import Any, Self

from nnsight_go import command


class Program:
    """A program that runs; ``said`` is its log."""

    def __init__(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.said.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Waits for the line of its log in which a pattern is found for the so manieth time."""
        with self._more:
            while True:
                found = [m for line in self.said if (m := re.search(pattern, line))]
                if len(found) >= count:
                    return found[count - 1]
                assert not self._ended, "".join(self.said)
                assert self._more.wait(120), "".join(self.said)

    def kill(self) -> None:
        """Ends it as an accident would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Asks it to end, and gives its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


class Process(Program):
    """``nnsight-go ARGUMENTS``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__([str(command.program()), *map(str, arguments)], command.environment())


def key_command(data: pathlib.Path, *words: str) -> str:
    """What ``nnsight-go key WORDS`` prints."""
    given = [str(command.program()), "key", "--data", str(data), *words]
    return subprocess.run(given, env=command.environment(), check=True, capture_output=True, text=True).stdout


class Server(Process):
    """``nnsight-go serve`` on a port of its own."""

    def __init__(self, data: pathlib.Path, *arguments: Any) -> None:
        super().__init__("serve", "--listen", "127.0.0.1:0", "--data", data, *arguments)
        self.host = self.wait_for(r"url=(http\S+)")[1]
        self.nats = next((m[1] for line in self.said if (m := re.search(r"nats=(\S+)", line))), "")
