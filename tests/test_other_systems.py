"""Where a system has less than Linux, files and studies still appear complete or not at all.

`like_windows` takes away what Windows does not have. It is no Windows: the laws were not run on one.
"""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patience import HANG
from polyak import _system
from polyak._files import writing
from polyak.cli import main
from polyak.integrations._arguments import checked

# Files of tests, and the tests in them that need what is taken away.
FILES = {
    "test_files.py": [
        "abandoned_parts_go",  # a folder that was left goes after a day
        "without_locks",  # of which these have one that fails
        "a_lock_that_fails",
    ],
    "test_folders.py": [],
    "test_offline_like.py": [],
    "test_safetensor_files.py": [
        "views_outlive",  # it removes a file that is open
        "released_pages",
        "larger_than_the_memory",
        "is_no_file",  # it opens a folder
    ],
    "test_recording.py": [],
    "test_saving.py": [
        # They replace a file that an error's traceback still has open.
        "TestRefusals and test_a_claim_of_slots",
        "test_descriptions_that_make_no_sense",
    ],
    "test_cli_files.py": [],
    "test_study_records.py": [
        # An empty file of records stays, since it is open when the study fails.
        "test_a_record_that_would_be_refused",
        "test_a_study_that_fails_before",
    ],
}
HOLDS = """
import sys
from pathlib import Path
import like_windows

like_windows.pytest_configure()
from polyak._system import Claim

claim = Claim(Path(sys.argv[1]))
print(claim.take(), flush=True)
sys.stdin.read()
"""


# What Windows does not have. A file that uses one asks `hasattr` for it, or for what comes with it.
LINUX_ONLY = {
    "os": {
        "preadv", "pread", "pwrite", "pwritev", "fchown", "chown", "lchown", "register_at_fork", "fork", "killpg",
        "setsid", "getuid", "geteuid", "getgid", "uname", "getloadavg", "sysconf", "statvfs", "fstatvfs", "sync",
        "mkfifo", "mknod", "sendfile", "copy_file_range", "sched_getaffinity", "posix_fallocate", "posix_fadvise",
        "O_CLOEXEC", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW", "O_SYNC", "O_DSYNC", "O_DIRECT", "O_TMPFILE",
        "memfd_create", "nice", "ttyname", "wait", "waitid", "WNOHANG", "listxattr", "getxattr", "setxattr", "getpgid",
    },
    "signal": {
        "SIGALRM", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGPIPE", "SIGTSTP", "alarm", "setitimer",
        "pause", "pthread_kill", "pthread_sigmask", "sigwait", "sigpending", "siginterrupt", "set_wakeup_fd",
    },
    "time": {"clock_gettime", "tzset", "pthread_getcpuclockid"},
    "socket": {"AF_UNIX", "socketpair", "sendmsg"},
}  # fmt: skip
NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "select", "curses", "syslog"}  # fmt: skip
SOURCES = sorted((Path(__file__).parent.parent / "src").rglob("*.py"))
UNFIT_NAMES = ["a:b", "a\\b", "..", "a.", "a ", "what?", "a\n", "<a>", "a|b", '"a"', "*"]
UNFIT_NAMES += ["con", "Aux", "lpt1.ema"]  # devices of Windows


def takes_text(call: ast.Call) -> bool:
    """Whether a call reads, writes or starts something as text."""
    is_method = isinstance(call.func, ast.Attribute)
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    keywords = {each.arg: each.value for each in call.keywords}
    if name_of(call) == "open" and of not in ("os", "Stored"):
        mode = keywords.get("mode", [*call.args, None, None][not is_method])
        return mode is None or "b" not in ast.unparse(mode)
    told = [ast.unparse(v) for k, v in keywords.items() if k in ("text", "universal_newlines")]
    return name_of(call) in ("read_text", "write_text", "fdopen") or "True" in told


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def test_text_is_utf_8_and_is_written_as_bytes() -> None:
    """Elsewhere the encoding is the system's, and a line end may become two characters."""
    faults = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                told = [each.value for each in node.keywords if each.arg == "encoding"]
                named = [ast.unparse(each) for each in told] in (["'utf-8'"], ["'utf-8-sig'"])
                if (takes_text(node) and not named) or name_of(node) == "write_text":
                    faults.append(f"{source.name}:{node.lineno}: {ast.unparse(node)}")
    assert not faults


def test_what_windows_lacks_is_asked_for() -> None:
    faults = []
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        asked = set(re.findall(r'(?:has|get)attr\(\w+, "(\w+)"', text))
        for node in ast.walk(ast.parse(text)):
            used = set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = {node.attr} & LINUX_ONLY.get(node.value.id, set()) - asked
            if isinstance(node, ast.Import) and source.name != "_system.py":
                used = {each.name for each in node.names} & NOT_ON_WINDOWS
            faults += [f"{source.name}: {name}" for name in used]
    assert not faults


def test_names_that_the_encoding_of_a_pipe_lacks_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "\u91cd.pt"
    torch.save({"\u307f": torch.ones(2)}, path)
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", stdout := io.TextIOWrapper(pipe, "cp1252"))
    with pytest.raises(SystemExit) as ended:
        main(["diff", str(path), str(path), "--all"])
    stdout.flush()
    assert (ended.value.code, stdout.errors) == (0, "strict")
    assert rb"\u307f" in pipe.getvalue()


@pytest.mark.parametrize("name", UNFIT_NAMES)
def test_names_that_no_file_can_have_are_refused_by_trainers(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"files get that name: wanted one of at most 60 characters, without"
    ):
        checked({name: "uniform()"}, 0, {})


def test_names_that_differ_in_case_alone_are_refused_by_trainers() -> None:
    with pytest.raises(ValueError, match="differ by more than upper and lower case"):
        checked({"ema": "uniform()", "EMA": "uniform()"}, 0, {})
    names = ["average", "console", "a.con", "ema 0.9", "exponential(0.9)", "1e-3", "a.b", "重"]
    assert list(checked(dict.fromkeys(names, "uniform()"), 0, {})[0]) == names


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_without_links_a_new_file_appears_and_replaces_none(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT has no links; an exchange of names is not everywhere either."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(_system, "_LINUX", False)
    monkeypatch.setattr(os, "link", refuse)
    place = tmp_path / "it"
    with writing(place, overwrite=False) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), writing(tmp_path / "late", overwrite=False) as file:
        (tmp_path / "late").write_bytes(b"another")
        file.write(b"late")
    assert place.read_bytes() == b"first"
    assert (tmp_path / "late").read_bytes() == b"another"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["it", "late"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_laws_of_files_hold(name: str) -> None:
    here = Path(__file__).parent
    left_out = " or ".join(f"({each})" for each in FILES[name])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "like_windows"]
    command += ["-p", "no:cacheprovider", "-m", "not slow", str(here / name)]
    command += ["-k", f"not ({left_out})"] if left_out else []
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_claim_beside_ends_with_its_process(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir() if kind == "folder" else path.touch()
    first, second = _Claims(path), _Claims(path)
    assert (first.said, second.said) == ("True", "False")
    second.end()
    first.kill()
    third = _Claims(path)
    assert third.said == "True"
    third.end()


class _Claims:
    def __init__(self, path: Path) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(path)], stdin=pipe, stdout=pipe, text=True, env=_environment()
        )  # fmt: skip
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def end(self) -> None:
        self._process.communicate(timeout=HANG)


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'src'}"}
