"""Runs of the script as real processes, without seconds of imports for each: a server imports once and forks.

`ForkServer` starts this file as a program. For each line of JSON on its standard input it forks a child that calls
`main(argv)`; a child can be told to kill itself at its k-th file operation, or to run into a disk error there. Its
clock goes on by a quarter of a second whenever the script looks at it, so that saves come after the same steps always.
progress.png is a stand-in, and the final pictures are left out, unless `pictures` is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
OPERATIONS = ("write", "fsync", "replace", "link", "unlink")


@dataclasses.dataclass
class Ended:
    """How a child ended: exit code, or minus the signal; what it printed; where its file operations are listed."""

    code: int
    text: str
    operations: list[str]


class ForkServer:
    """The client's side; use as a context manager."""

    def __init__(self, source: str | None = None):
        self.source = source or os.environ.get("FINETUNE_SIGLIP_SOURCE", str(ROOT))

    def __enter__(self) -> ForkServer:
        paths = os.pathsep.join([self.source, str(ROOT / "tests")])
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def _ask(self, **request: object) -> dict:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv: list[str], log: Path, **shim: object) -> int:
        """Fork a child that runs `main(argv)`, printing to `log`; returns its pid. For `shim` see `Shim`."""
        self.log = log
        return self._ask(run=[str(a) for a in argv], log=str(log), **shim)["pid"]

    def wait(self, pid: int, timeout: float = 900) -> Ended:
        """Wait for a child; one that outlasts `timeout` is killed and has the code -9 and `hang` in its text."""
        code = self._ask(wait=pid, timeout=timeout)["code"]
        text = self.log.read_text(errors="replace")
        trace = self.log.with_suffix(".operations")
        return Ended(code, text, trace.read_text().split("\n")[:-1] if trace.exists() else [])

    def run(self, argv: list[str], log: Path, timeout: float = 900, **shim: object) -> Ended:
        return self.wait(self.start(argv, log, **shim), timeout)


class Shim:
    """Counts writes, syncs, renames, links and removals under `folder`; at number `at` it kills or fails.

    `how`: `kill` before the operation (a write is half done), `signal` (a SIGTERM, then it goes on), or the name of an
    errno that the operation then raises.
    """

    def __init__(self, folder: str, trace: Path, at: int = 0, how: str = "kill"):
        self.folder, self.trace, self.at, self.how, self.count = folder, trace.open("a"), at, how, 0
        self.real = {name: getattr(os, name) for name in OPERATIONS if name != "write"}

    def install(self, module) -> None:
        os.fsync = lambda handle: self.call("fsync", f"/proc/self/fd/{handle}", handle)
        os.unlink = lambda path, **k: self.call("unlink", path, path, **k)
        os.replace = lambda a, b, **k: self.call("replace", b, a, b, **k)
        os.link = lambda a, b, **k: self.call("link", b, a, b, **k)
        # Python 3.10's pathlib keeps the functions that it found at first
        if accessor := getattr(pathlib, "_NormalAccessor", None):
            accessor.unlink = staticmethod(os.unlink)
        module.open = self.open  # in the script's own namespace, it stands before the builtin

    def call(self, name: str, path: object, *args: object, **more: object) -> object:
        self.reached(name, path)
        return self.real[name](*args, **more)

    def reached(self, name: str, path: object, half: object = None) -> None:
        path = os.path.realpath(path) if name == "fsync" else os.path.abspath(path)
        if not path.startswith(self.folder) or path.endswith(("training.log", ".lock")):
            return
        self.count += 1
        self.trace.write(f"{name} {path[len(self.folder) + 1 :]}\n")
        if self.count == self.at:
            self.trace.flush()
            if half and self.how != "signal":
                half()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "signal":
                return os.kill(os.getpid(), signal.SIGTERM)
            import errno

            raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)), path)

    def open(self, path: object, mode: str = "r", *args: object, **more: object):
        file = open(path, mode, *args, **more)  # noqa: SIM115, the caller closes it
        return Counted(file, self, path) if mode in ("wb", "xb") else file


class Counted:
    """A file opened for writing whose writes are counted."""

    def __init__(self, file, shim: Shim, path: object):
        self._file, self._shim, self._path = file, shim, path

    def write(self, data) -> int:
        def half() -> None:
            self._file.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            self._file.flush()

        self._shim.reached("write", self._path, half)
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def run_child(request: dict, module) -> None:
    """In the forked child: never returns."""
    code, shim = 1, None
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request.get("env", {}))
        if "folder" in request:
            trace = Path(request["log"]).with_suffix(".operations")
            trace.unlink(missing_ok=True)
            shim = Shim(str(Path(request["folder"]).resolve()), trace, request.get("at", 0), request.get("how", "kill"))
            shim.install(module)
        if not request.get("pictures"):  # drawing one takes longer than all the rest of an epoch of these tests
            png = b"\x89PNG\r\n\x1a\n" + bytes(99) + b"IEND\xaeB`\x82"
            module.publish = lambda *_: {"metrics": {}}
            module.draw_most_wrong = lambda *_: None
            module.draw_progress = lambda *_: None
            module.save_figure = lambda path, _: module.save_atomic(path, lambda f: f.write(png))
        if "publish_seconds" in request:
            begun = Path(request["log"]).with_suffix(".publishing")
            module.publish = lambda *_: (begun.touch(), time.sleep(request["publish_seconds"]), {"metrics": {}})[-1]
        if "commit_seconds" in request:  # while there is a file "slow" in the run's folder
            commit = module.RunFolder.commit

            def slowly(folder, content):
                time.sleep(request["commit_seconds"] * (folder.path / "slow").exists())
                commit(folder, content)

            module.RunFolder.commit = slowly
        if limit := request.get("largest_file"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        ticks = itertools.count()
        module.time = SimpleNamespace(**vars(time))
        module.time.monotonic = lambda: next(ticks) / 4
        if "signal_in" in request:  # the predictions of this title
            predict = module.predict

            def stopped(*args, **more):
                if request["signal_in"] in args:
                    os.kill(os.getpid(), signal.SIGTERM)
                return predict(*args, **more)

            module.predict = stopped
        if "signal_at" in request:  # the beginning of this function
            function = getattr(module, request["signal_at"])

            def begun(*args, **more):
                os.kill(os.getpid(), signal.SIGTERM)
                return function(*args, **more)

            setattr(module, request["signal_at"], begun)
        if "hangs" in request:  # while there is such a file, no scan can be read
            load, hangs = module.load_sample, Path(request["hangs"])
            module.load_sample = lambda *a: time.sleep(600 * hangs.exists()) or load(*a)
        if "free_bytes" in request:
            module.shutil = SimpleNamespace(**vars(shutil))
            module.shutil.disk_usage = lambda _: SimpleNamespace(free=request["free_bytes"])
        code = module.main(request["run"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            if shim:
                shim.trace.flush()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def wait_for(pid: int, timeout: float) -> int:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def serve() -> None:
    """Import everything that a run needs, then fork a child per request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print must not mix with the answers
    import torch

    import finetune_siglip as module

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401
        import pandas  # noqa: F401
        import threadpoolctl  # noqa: F401
        import tqdm  # noqa: F401
    from helpers import SMALL_TOWER

    module.build_backbone(SMALL_TOWER)  # imports transformers' models
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": wait_for(request["wait"], request["timeout"])}
        else:
            pid = os.fork()
            if not pid:
                faulthandler.enable()
                run_child(request, module)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
