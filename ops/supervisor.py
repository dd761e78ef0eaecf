"""Starts processes, waits until each is ready, notices when one dies, takes all of them down in order."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Say = Callable[[str], None]
"""Receives one line of progress for a person."""

READY_FILE = "RUNBOOKS_READY_FILE"
"""A process that finds this variable writes the file it names once it is ready to work."""

_LAUNCHER = Path(__file__).with_name("child.py")
_ATTEMPT = timedelta(seconds=2)
_LOOK_EVERY = timedelta(milliseconds=50)
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """A process to run."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Awaitable[None]] | Path
    """Raises while the process is not ready; or the file that the process writes (named in `RUNBOOKS_READY_FILE`)."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The whole environment of the process."""
    ready_within: timedelta = timedelta(seconds=60)
    stop_within: timedelta = timedelta(seconds=10)
    """From SIGTERM to SIGKILL."""


class ChildFailed(Exception):
    """A child died or did not become ready. The message holds the tail of its log."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        self.name = name
        self.what = what
        super().__init__(f"{name} {what}. The end of its log ({log}):\n{_tail(log)}")


class _Child:
    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.process = process
        self.ends_on_purpose = False
        self.watch: asyncio.Task[None]


class Supervisor:
    """Children in the order of their start; a death that nobody asked for takes the others down too.

    Use it from one event loop, in a thread that lives as long as the children shall.
    """

    def __init__(self, log_dir: Path, say: Say) -> None:
        self._log_dir = log_dir
        self._say = say
        self._children: dict[str, _Child] = {}
        self._lifeline, self._held_end = os.pipe()
        self._failure: asyncio.Future[ChildFailed] = asyncio.get_running_loop().create_future()
        self._stopping: asyncio.Task[None] | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Name to process id of the children that run."""
        return {name: child.process.pid for name, child in self._children.items() if child.process.returncode is None}

    def log(self, name: str) -> Path:
        """Where the output of that child goes."""
        return self._log_dir / f"{name}.log"

    async def start(self, *specs: ChildSpec) -> None:
        """Starts these together and waits until all are ready.

        Raises:
            ChildFailed: one died or was not ready in time; everything is down by then.
        """
        try:
            for spec in specs:
                self.log(spec.name).unlink(missing_ok=True)
                await self._spawn(spec)
            await asyncio.gather(*(self._until_ready(self._children[spec.name]) for spec in specs))
        except BaseException:
            await self.stop()
            if self._failure.done():
                raise self._failure.result() from None  # the first death, not one that it caused
            raise

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work`, and gives it up when a child dies.

        Raises:
            ChildFailed: a child died; everything is down by then.
        """
        task = asyncio.current_task()
        assert task is not None

        def give_up(_: object) -> None:
            task.cancel()

        self._failure.add_done_callback(give_up)
        try:
            return await work
        except asyncio.CancelledError:
            if not self._failure.done():
                raise
            task.uncancel()
            await self.stop()
            raise self._failure.result() from None
        finally:
            self._failure.remove_done_callback(give_up)

    def kill(self, name: str) -> None:
        """Ends a child with SIGKILL, as a crash would; nothing else is taken down, and `restart` brings it back."""
        child = self._children[name]
        child.ends_on_purpose = True
        if child.process.returncode is None:
            child.process.kill()

    async def restart(self, name: str) -> None:
        """Ends a child in order if it still runs, starts it again and waits until it is ready."""
        child = self._children[name]
        await self._end(child)
        await self._spawn(child.spec)
        await self._until_ready(self._children[name])

    async def stop(self) -> None:
        """Takes everything down, the last started first; a second call waits for the first one."""
        await asyncio.shield(self._begin_stop())

    def _begin_stop(self) -> asyncio.Task[None]:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        return self._stopping

    async def _stop(self) -> None:
        for child in reversed(self._children.values()):
            if child.process.returncode is None:
                self._say(f"stopping {child.spec.name}")
            await self._end(child)
        os.close(self._held_end)
        os.close(self._lifeline)

    async def _spawn(self, spec: ChildSpec) -> None:
        env = dict(spec.env)
        if isinstance(spec.ready, Path):
            spec.ready.unlink(missing_ok=True)
            env[READY_FILE] = str(spec.ready)
        with self.log(spec.name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-S", "-I", str(_LAUNCHER), str(self._lifeline), *spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                pass_fds=[self._lifeline],
                start_new_session=True,
            )
        child = self._children[spec.name] = _Child(spec, process)
        child.watch = asyncio.create_task(self._watch(child))

    async def _watch(self, child: _Child) -> None:
        code = await child.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)  # its watchdog and whatever it left behind
        if child.ends_on_purpose or self._stopping or self._failure.done():
            return
        failure = self._ended(child.spec, code)
        self._say(f"{failure.name} {failure.what}: taking the rest down")
        self._failure.set_result(failure)
        self._begin_stop()

    def _ended(self, spec: ChildSpec, code: int) -> ChildFailed:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildFailed(spec.name, how, self.log(spec.name))

    async def _end(self, child: _Child) -> None:
        child.ends_on_purpose = True
        if child.process.returncode is None:
            child.process.terminate()
            try:
                await asyncio.wait_for(child.process.wait(), child.spec.stop_within.total_seconds())
            except TimeoutError:
                self._say(f"{child.spec.name} did not stop within {child.spec.stop_within.total_seconds():g} s: killed")
                child.process.kill()
        await child.watch

    async def _until_ready(self, child: _Child) -> None:
        spec = child.spec
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + spec.ready_within.total_seconds()
        while True:
            if child.process.returncode is not None:
                raise self._ended(spec, child.process.returncode)
            try:
                if isinstance(spec.ready, Path):
                    _check_file(spec.ready)
                else:
                    await asyncio.wait_for(spec.ready(), _ATTEMPT.total_seconds())
            except Exception as error:
                reason = str(error) or type(error).__name__
            else:
                self._say(f"{spec.name} is ready")
                return
            if loop.time() > give_up_at:
                what = f"was not ready within {spec.ready_within.total_seconds():g} s ({reason})"
                raise ChildFailed(spec.name, what, self.log(spec.name))
            await asyncio.sleep(_LOOK_EVERY.total_seconds())


def _check_file(ready: Path) -> None:
    if not ready.exists():
        raise FileNotFoundError(f"{ready} is not written yet")


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (empty)"
