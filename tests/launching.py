"""Launch ranks as real processes, or real torchrun, and leave none behind.

The limits do not depend on how busy the machine is. Ranks are ended when they have used more of the
processor than they may, or none for a while, as ranks that wait for each other do.

The ranks of torchrun are found by a mark in their environment.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TORCHRUN = Path(sysconfig.get_path("scripts")) / "torchrun"
_MARK = "POLYAK_LAUNCH"
SECONDS = 900.0
"""The work that ranks may do together, in seconds of the processor."""
_SPARE = 3
_IDLE = 120.0  # seconds of waiting without work after which ranks count as hung
_BUSY = 0.005  # of a processor for each rank: five times what its threads use while it waits
# Without it restarted ranks may wait for dead ones (pytorch#135712). With it the first rank listens on a
# port that was found free seconds before, and may be taken by then: for that are spare restarts.
_OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Watch:
    """Tells when to give up on processes: after so many seconds of work in all, or when they only wait."""

    def __init__(self, seconds: float) -> None:
        self._most = seconds
        self._used: dict[int, float] = {}
        self._since, self._then = time.monotonic(), 0.0

    def over(self, pids: Iterable[int]) -> str:
        """Why it is time to give up; nothing if it is not."""
        for pid in pids:
            with suppress(OSError):  # it may have ended
                self._used[pid] = _work_of(pid)
        used, now = sum(self._used.values()), time.monotonic()
        if used > self._most:
            return (
                f"they have used {used:.0f} seconds of the processor, wanted at most {self._most}"
            )
        waited = now - self._since
        if used - self._then > _BUSY * max(len(self._used), 1) * max(waited, 1):
            self._since, self._then = now, used
        elif waited > _IDLE:
            return f"they have done nothing for {waited:.0f} seconds: they wait for each other"
        return ""


def _work_of(pid: int) -> float:
    """Seconds that a process and its ended children have used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Launch:
    """One torchrun with all that it started, also what it has lost; `log` is what they say."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._mark = secrets.token_hex(16)
        told = {_MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [str(TORCHRUN), "--standalone", *arguments],
                env={**os.environ, **told, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def failures(self) -> int:
        """How often ranks have failed, but for ports that were taken."""
        return self.said.count("failed (exitcode:") - self.said.count("name: EADDRINUSE")

    def wait(self, seconds: float = SECONDS) -> str:
        """What was said, once all have ended well, within so many seconds of work."""
        self._wait(lambda: self._process.poll() is not None, seconds)
        assert self._process.poll() == 0, f"exit code {self._process.poll()}: {self.said[-6000:]}"
        assert not self.left(), f"left behind: {self.left()}"
        return self.said

    def wait_for(self, text: str, seconds: float = SECONDS) -> None:
        """Until some rank has said this, within so many seconds of work."""
        self._wait(lambda: text in self.said or self._process.poll() is not None, seconds)
        assert text in self.said, self.said[-6000:]

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        watch = Watch(seconds)
        while not until():
            # torchrun itself looks after its ranks all the time, so it is never idle.
            ranks = [pid for pid in self.left() if pid != self._process.pid]
            over = watch.over(ranks or [self._process.pid])
            assert not over, f"{over}: {self.said[-6000:]}"
            time.sleep(0.05)

    def left(self) -> list[int]:
        """The processes with the mark: each rank is the leader of a session of its own."""
        entry = f"{_MARK}={self._mark}".encode()
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if entry in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        """SIGKILL to torchrun, then to every rank."""
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + 20
        while left := self.left():
            assert time.monotonic() < deadline, f"they do not end: {left}"
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


@contextmanager
def launched(
    script: Path,
    *arguments: str,
    log: Path,
    ranks: int = 2,
    restarts: int = 0,
    environment: dict[str, str] | None = None,
) -> Iterator[Launch]:
    """A script run by torchrun; nothing of it is left when the block ends."""
    most = restarts + _SPARE if restarts else 0
    numbers = [f"--nproc-per-node={ranks}", f"--max-restarts={most}"]
    told = (_OWN_STORE if restarts else {}) | (environment or {})
    launch = Launch([*numbers, str(script), *arguments], log, told)
    try:
        yield launch
    finally:
        launch.kill()


def said_by(script: Path | str, world: int, folder: Path, seconds: float = SECONDS) -> list[str]:
    """What so many real processes of a script print, once all of them are done; the first that fails ends all.

    Under load glibc now and then ends a rank that waits in a collective of torch 2.13 with gloo, as its
    heap is corrupted: seen twice in some 200 launches, never under memcheck or an address sanitizer.
    So ranks of which one was ended so are launched once more, which is told; anything else that fails
    is not tried again.
    """
    codes, ends = _launched(script, world, folder, seconds)
    if set(codes) & {-signal.SIGABRT, -signal.SIGSEGV}:
        told = f"\nlaunched again, as a rank crashed: {script} {world} {codes}: {ends[-6000:]}\n"
        print(told, file=sys.__stderr__, flush=True)
        (folder / "store").unlink(missing_ok=True)
        codes, ends = _launched(script, world, folder, seconds)
    assert codes == [0] * world, ends
    # Before torch 2.13 gloo prints of its own.
    return [re.sub(r"(?m)^\[Gloo\].*\n", "", log.read_text()) for log in _logs(world, folder)]


def _logs(world: int, folder: Path) -> list[Path]:
    return [folder / f"rank{rank}" for rank in range(world)]


def _launched(
    script: Path | str, world: int, folder: Path, seconds: float
) -> tuple[list[int | None], str]:
    """The exit codes of all ranks, None for those that had to be ended, and what they said last.

    Together they may use the processor for so many seconds.
    """
    logs = _logs(world, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), str(folder), str(rank), str(world)]
        with log.open("w") as said, Path(f"{log}.errors").open("w") as errors:
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=errors))
    watch, over = Watch(seconds), ""
    try:
        while any(each.poll() is None for each in processes) and not over:
            if any(each.poll() for each in processes):
                time.sleep(0.5)  # the one that failed first may not be the first that is seen
                break
            over = watch.over(each.pid for each in processes if each.poll() is None)
            time.sleep(0.1)
        codes = [each.poll() for each in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ends = [f"{log.name}: {log.read_text()}{Path(f'{log}.errors').read_text()}" for log in logs]
    return codes, "\n".join([over, *(end[-3000:] for end in ends)])


def require_laws(
    script: Path | str,
    laws: Sequence[Callable[[], None]],
    world: int,
    folder: Path,
    seconds: float = SECONDS,
) -> None:
    """Every one of so many ranks says that all laws hold, in their order."""
    wanted = [law.__name__ for law in laws]
    for said in said_by(script, world, folder, seconds):
        assert said.splitlines() == wanted
