"""Starts the other ranks of a job, watches them, and ends all of them together.

The process that asks for several ranks is rank 0: a notebook's kernel, a script or a server. `Family` starts
the others as `python -m MODULE`, so they never import its `__main__`. Data moves by `torch.distributed`;
orders come through a socket, and are answered there. Nothing of this outlives the job:

- A rank that dies is seen at once by a thread of rank 0. It ends the others and breaks the communication, so
  a collective that waits fails. The call of rank 0 then raises `RankFailed` with rank and cause.
- When rank 0 dies, however it dies, the system closes its end of every rank's lifeline, a pipe. A thread of
  the rank sees that, even during a collective, and ends the process.
- An exception or an interrupt in the middle of a call of rank 0 ends all ranks: they would wait for data that
  never come.

Ranks get no interrupt from the terminal: only rank 0 handles it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Longest wait in a collective. Ranks compile at the same time, but not equally fast."""
JOIN_SECONDS = 300.0
"""Longest time until every rank has imported PyTorch and joined."""
GRACE_SECONDS = 5.0
"""Time for a rank to end by itself before it is killed."""
SETTLE_SECONDS = 0.5
"""Time in which the deaths of several ranks count as one event."""
SHOWN_LINES = 25
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
# NVLink multicast needs rights that shared hosts do not give. The family aborts NCCL itself when a rank
# dies, for which PyTorch's own handling has to be off (`_abort_process_group`).
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
               "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
_BROKEN = ("onnection closed", "onnection reset", "roken pipe", "ocket", "NCCL", "imed out")


class RankFailed(RuntimeError):
    """A rank ended, and all others with it. The message names the rank and the cause."""


class Family:
    """Rank 0's side of a job.

    `announce` gives an order to other ranks; every call that then takes part in a collective belongs inside
    `watched`. `close` ends the job, and so does the end of this object or of the process.
    """

    def __init__(self, module: str, devices: Sequence[torch.device], environment: Mapping[str, str] = {}):
        """Start the other ranks and join them.

        Args:
            module: what the others run; it calls `run_rank`.
            devices: of every rank.
            environment: more variables for the others.

        Raises:
            UserError: this process takes part in a job already.
            RankFailed: a rank ended before it joined.
        """
        _claim_process()
        self.size = size = len(devices)
        backend = BACKENDS[devices[0].type]
        os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False,
                              timeout=COLLECTIVE_TIMEOUT)
        self._state = _State(backend)
        self._end = weakref.finalize(self, _State.end, self._state)
        try:
            for rank in range(1, size):
                self._state.start(rank, size, module, environment)
                self._state.members[-1].orders.send((store.port, str(devices[rank])))
            self._state.watch()
            for rank in range(1, size):
                self.reply(rank, JOIN_SECONDS)
            with self.watched():
                _join(store, 0, size, devices[0])
        except BaseException:
            self.close()
            raise
        _current.append(weakref.ref(self))

    @property
    def pids(self) -> dict[int, int]:
        """Process by rank, without rank 0."""
        return {member.rank: member.process.pid for member in self._state.members}

    @property
    def closed(self) -> bool:
        return self._state.ended

    def announce(self, order: tuple[Any, ...], to: Sequence[int] | None = None) -> None:
        """Send an order to the ranks `to`; None: to all others.

        Raises:
            RankFailed: a rank has ended.
            UserError: the job was closed.
        """
        self.check()
        for member in self._state.members:
            if to is None or member.rank in to:
                try:
                    member.orders.send(order)
                except OSError:
                    self._state.settle()
                    self.check()
                    raise

    def reply(self, rank: int, seconds: float = COLLECTIVE_TIMEOUT.total_seconds()) -> Any:
        """Wait for the answer of a rank.

        Raises:
            RankFailed: a rank ended, or did not answer in time.
        """
        member = next(member for member in self._state.members if member.rank == rank)
        deadline = time.monotonic() + seconds
        while not self._state.ended and time.monotonic() < deadline:
            try:
                if member.orders.poll(0.05):
                    return member.orders.recv()
            except (EOFError, OSError):
                self._state.settle()
                break
            if self._state.failure:
                break
        self.check()
        self.close()
        raise RankFailed(f"rank {rank} of {self.size} did not answer within {seconds:.0f} s; all ranks were "
                         "ended.")

    def check(self) -> None:
        """Raise if the job is over.

        Raises:
            RankFailed: a rank has ended.
            UserError: the job was closed.
        """
        if self._state.failure:
            self.close()
            raise RankFailed(self._state.failure)
        if self._state.ended:
            raise UserError("gpus: the ranks of this pipeline have ended; build the pipeline again.")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Run a body that takes part in collectives. If it raises, all ranks end, because the others would
        wait for this one.

        Raises:
            RankFailed: instead of what the body raised because a rank ended.
        """
        self.check()
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                self._state.settle()
            failure = self._state.failure
            self.close()
            if failure:
                raise RankFailed(failure) from error
            raise
        self.check()

    def at_end(self, release: Callable[[], None]) -> None:
        """Call a method of an object, if it still lives, when the ranks have ended: it lets kernels end that
        wait for them, or releases graphs of such kernels. Another thread may call it.
        """
        self._state.releases.append(weakref.WeakMethod(release))

    def close(self) -> None:
        """End all other ranks and wait for it. May be called twice."""
        self._state.end()


class _Member:
    """One other rank: its process, its orders, its lifeline and what it prints."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], orders: Connection, lifeline: int,
                 printed: IO[bytes]):
        self.rank = rank
        self.process = process
        self.orders = orders
        self.lifeline = lifeline
        self.printed = printed
        self.sentinel = os.pidfd_open(process.pid)

    def last_lines(self) -> list[str]:
        """The end of what it printed."""
        self.printed.seek(0)
        text = self.printed.read().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-SHOWN_LINES:]


class _State:
    """What the watching thread and the finalizer need. It does not refer to the `Family`, which may be
    released while they live.
    """

    def __init__(self, backend: str):
        self.backend = backend
        self.members: list[_Member] = []
        self.failure = ""
        self.ended = False
        self._aborting = False
        self.releases: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._lock = threading.RLock()
        self._settled = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()

    def start(self, rank: int, size: int, module: str, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        their_lifeline, lifeline = os.pipe()
        printed = tempfile.TemporaryFile(prefix="longlive-rank-")
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        numbers = (rank, size, theirs.fileno(), their_lifeline)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, numbers)],
                stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), their_lifeline), start_new_session=True,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)})
        finally:
            theirs.close()
            os.close(their_lifeline)
        self.members.append(_Member(rank, process, Connection(ours.detach()), lifeline, printed))

    def watch(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """Wait for a death that `end` did not cause, then end the others and break the communication."""
        sentinels = [member.sentinel for member in self.members]
        poll = select.poll()
        for descriptor in (*sentinels, self._wake_read):
            poll.register(descriptor, select.POLLIN)
        if any(descriptor == self._wake_read for descriptor, _ in poll.poll()):
            return
        time.sleep(SETTLE_SECONDS)
        with self._lock:
            if not self.ended:
                self.failure = self._cause()
                _end_processes(self.members, graceful=False)
                self._leave()
        self._settled.set()

    def _cause(self) -> str:
        """Name the rank that died first, and why. The others may have died of it."""
        size = len(self.members) + 1
        dead = [member for member in self.members if member.process.poll() is not None]
        causes = []
        for member in dead:
            code, lines = member.process.returncode, member.last_lines()
            if code < 0:
                killed = signal.Signals(-code).name
                why = " (the system's log says whether memory ran out)" if killed == "SIGKILL" else ""
                causes.append((0, member.rank, f"was killed by {killed}{why}", lines))
            else:
                last = lines[-1] if lines else f"exit code {code}"
                of_others = any(word in last for word in _BROKEN)
                causes.append((2 if of_others else 1, member.rank, f"failed: {last}", lines))
        if not causes:
            return f"a rank of {size} ended; all ranks were ended."
        _, rank, what, lines = min(causes, key=lambda cause: cause[:2])
        text = f"rank {rank} of {size} {what}. All ranks were ended; build the pipeline again."
        if lines and "failed" in what:
            text += "\n" + "\n".join(f"[rank {rank}] {line}" for line in lines)
        return text

    def settle(self) -> None:
        """After an error in a collective: wait until the watching thread knows whether a rank has died."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not self.ended:
            if any(member.process.poll() is not None for member in self.members):
                self._settled.wait(SETTLE_SECONDS + GRACE_SECONDS)
                return
            time.sleep(0.02)

    def end(self) -> None:
        """End the ranks, in order if they are alive."""
        with self._lock:
            if self.ended or os.getpid() != self._owner:
                return
            self.ended = True
            with contextlib.suppress(OSError):
                os.write(self._wake_write, b"x")
            _end_processes(self.members, graceful=not self.failure)
            self._leave()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE_SECONDS)
        for member in self.members:
            member.printed.close()
            os.close(member.sentinel)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _leave(self) -> None:
        """Take rank 0 out of the communication, so that nothing of this process waits for it. Called again
        when the job ends after a failure.
        """
        while self.releases:
            if release := self.releases.pop()():
                release()
        if not dist.is_initialized():
            return
        if self.backend == "nccl" and not self._aborting:
            self._aborting = True
            # Unlike destroying, this does not wait for the other ranks. But it waits until no CUDA graph with
            # a collective is left, and after a failure the traceback may hold one.
            thread = threading.Thread(target=dist.distributed_c10d._abort_process_group, name="abort",
                                      daemon=True)
            with contextlib.suppress(RuntimeError):  # Python ends, and all communication with it
                thread.start()
                _leaving.append(thread)
                thread.join(GRACE_SECONDS)
        elif self.backend != "nccl" and self.ended:
            # While rank 0 may be inside of a collective, only the ranks' end breaks it.
            dist.destroy_process_group()


_current: list[weakref.ref[Family]] = []
_leaving: list[threading.Thread] = []


def _claim_process() -> None:
    """Refuse a second job in this process.

    Raises:
        UserError: another pipeline has its ranks, or the program was started under torchrun.
    """
    if not dist.is_initialized():
        return
    gc.collect()
    while _leaving:
        _leaving.pop().join(GRACE_SECONDS)
    if not dist.is_initialized():
        return
    if any((family := ref()) is not None and not family.closed for ref in _current):
        raise UserError("gpus: another pipeline of this process still has its ranks; close its session "
                        "(session.close()) before you build this one.")
    raise UserError("gpus: this process already takes part in a torch.distributed job; start it without "
                    "torchrun, because it starts its ranks itself.")


def _join(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=size,
                            timeout=COLLECTIVE_TIMEOUT, device_id=device if device.type == "cuda" else None)


def _end_processes(members: Sequence[_Member], graceful: bool) -> None:
    for member in members:
        member.orders.close()
        if member.lifeline >= 0:
            os.close(member.lifeline)
            member.lifeline = -1
    deadline = time.monotonic() + (GRACE_SECONDS if graceful else 0)
    for member in members:
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(max(0, deadline - time.monotonic()))
            continue
        member.process.kill()
        member.process.wait()


def run_rank(serve: Callable[[int, torch.device, Connection], None]) -> NoReturn:
    """The main function of a rank that `Family` started: join, serve until the orders end, and exit.

    Args:
        serve: called with rank, device and the connection of orders.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, size, orders_fd, lifeline = map(int, sys.argv[1:])
    threading.Thread(target=_end_with_rank_0, args=(lifeline,), name="lifeline", daemon=True).start()
    orders = Connection(orders_fd)
    code = 1
    try:
        port, name = orders.recv()
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=COLLECTIVE_TIMEOUT)
        orders.send("joined")
        _join(store, rank, size, device)
        with contextlib.suppress(EOFError):
            serve(rank, device, orders)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: the end of a communicator may wait for ranks that are gone.
        os._exit(code)


def _end_with_rank_0(lifeline: int) -> None:
    """Wait for the end of rank 0, which never writes, and end this process."""
    parent, poll = os.getppid(), select.poll()
    poll.register(lifeline, select.POLLIN)
    # A process that rank 0 has forked keeps the lifeline open, but does not become the parent of this one.
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    os._exit(0)


