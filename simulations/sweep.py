"""A sweep: the runs of a command one after the other or side by side, each as it would be alone.

Side by side they run in processes (`fedlr.simulations.sweep_worker`), each of which takes one run after the other.
Libraries get their share of the cores, and threads that wait do not spin. What a run computes does not depend on who
runs beside it: its configuration, `runtime.num_workers` included, is the one that was typed. A process that dies takes
its run with it and nothing else.
"""

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.errors.messages import one_line
from fedlr.files import NotWritten, is_full
from fedlr.runs.asked import Earlier, earlier_run
from fedlr.runs.directory import BeingWritten

WORKER = "fedlr.simulations.sweep_worker"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep; `unfinished` is the folder of an earlier process that was cut off in it."""

    number: int
    overrides: tuple[str, ...]
    experiment: Experiment
    unfinished: Path | None = None


def run_sweep(
    jobs: Sequence[Sequence[str]],
    experiments: Sequence[Experiment],
    *,
    num_jobs: int = 1,
    skip_done: bool = False,
    say: Say,
) -> list[Path | None]:
    """Run every experiment and return the directories in their order, None of one that failed: it stops no other.

    Args:
        jobs: the overrides of each run.
        experiments: the same, composed and checked.
        num_jobs: how many run side by side.
        skip_done: whether a run that is there already is not repeated, and one that was cut off is finished.
        say: told every line; of runs side by side each begins with the number of the run.

    Raises:
        InputError: the only run of a command failed.
        KeyboardInterrupt: after the runs in progress have been stopped; they can be taken up.
    """
    all_jobs = [Job(k, tuple(o), e) for k, (o, e) in enumerate(zip(jobs, experiments, strict=True), start=1)]
    done: dict[int, Path] = {}
    left = all_jobs
    if skip_done:
        left, done = _without_done(all_jobs, say=say)
    try:
        if num_jobs > 1 and len(left) > 1:
            done |= _Processes(left, total=len(jobs), num_jobs=min(num_jobs, len(left)), say=say).run()
        else:
            done |= _one_by_one(left, total=len(jobs), say=say)
    except KeyboardInterrupt:
        if len(jobs) > 1:
            say("\nthe sweep was stopped; the same command with --skip-done finishes what is left of it")
        raise
    return [done.get(job.number) for job in all_jobs]


def run_job(experiment: Experiment, unfinished: Path | None, *, say: Say, is_trial: bool = False) -> Path:
    """Run an experiment, or finish an earlier run of it that was cut off, and return its directory.

    Raises:
        InputError: for an experiment that cannot run; the disk is full.
    """
    from fedlr.simulations.resume import resume  # both import torch, which nobody waits for before a typo is told
    from fedlr.simulations.simulate import simulate

    if unfinished is not None:
        try:
            say(f"going on with {unfinished}")
            resume(unfinished, say=say, own_parts=_own_parts(experiment))
            return unfinished
        except BeingWritten:
            raise
        except InputError as error:
            if isinstance(error, NotWritten) or error.exit_code != InputError.exit_code:
                raise  # a full disk: with room made it goes on
            say(f"note: {unfinished} stays as it is, and the run starts anew: {error}")
    return simulate(experiment, say=say, is_trial=is_trial)


def _own_parts(experiment: Experiment) -> list[str]:
    from fedlr.config.parts import own_parts_of

    return own_parts_of(experiment.resolved())


def _title(job: Job, total: int) -> str:
    return f"[{job.number}/{total}] {' '.join(job.overrides)}"


def _without_done(jobs: Sequence[Job], *, say: Say) -> tuple[list[Job], dict[int, Path]]:
    """Return the runs that are left to do, and the directories of the others by number; each is said aloud."""
    left, done = [], {}
    for job in jobs:
        earlier = earlier_run(job.experiment)
        if earlier is None:
            left.append(job)
        elif not earlier.is_finished:
            left.append(Job(job.number, job.overrides, job.experiment, earlier.run_dir))
        else:
            say(f"{_title(job, len(jobs))}: {_skipped(earlier)}")
            if earlier.problem is None:
                done[job.number] = earlier.run_dir
    return left, done


def _skipped(earlier: Earlier) -> str:
    other = "" if earlier.changed is None else f", with other versions ({earlier.changed})"
    learnt = "" if earlier.problem is None else f", and failed: {earlier.problem}"
    return f"done before, in {earlier.run_dir}{other}{learnt}"


def _one_by_one(jobs: Sequence[Job], *, total: int, say: Say) -> dict[int, Path]:
    done = {}
    for job in jobs:
        if total > 1:
            say(f"\n{_title(job, total)}")
        try:
            done[job.number] = run_job(job.experiment, job.unfinished, say=say)
        except Exception as error:
            if total == 1 or is_full(error):
                raise
            if not isinstance(error, InputError):
                traceback.print_exc()
            print(f"{_title(job, total)}: {told(error)}", file=sys.stderr, flush=True)
        else:
            say(f"\nresults in {done[job.number]}")
    return done


def told(error: BaseException) -> str:
    """Return an error as one line: as it is where it was written for the user, else with its type."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error)[:300]}"


class _Processes:
    """Runs side by side: a thread for each process hands it one run after the other."""

    def __init__(self, jobs: Sequence[Job], *, total: int, num_jobs: int, say: Say) -> None:
        self._waiting: SimpleQueue[Job] = SimpleQueue()
        for job in jobs:
            self._waiting.put(job)
        self._total, self._num_jobs, self._say = total, num_jobs, say
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._processes: set[subprocess.Popen[str]] = set()
        self._done: dict[int, Path] = {}

    def run(self) -> dict[int, Path]:
        """Return the directories of the runs that came out, by number."""
        with ThreadPoolExecutor(self._num_jobs, thread_name_prefix="sweep") as threads:
            try:
                for one in [threads.submit(self._serve) for _ in range(self._num_jobs)]:
                    one.result()
            finally:
                self._stop()
        return self._done

    def _serve(self) -> None:
        process = None
        while not self._stopped.is_set():
            try:
                job = self._waiting.get_nowait()
            except Empty:
                break
            if process is None or process.poll() is not None:
                process = self._started()
            self._tell(job, f"starts: {' '.join(job.overrides)}")
            self._hand_over(process, job)
        if process is not None:
            _end(process)

    def _started(self) -> "subprocess.Popen[str]":
        threads = max(1, len(os.sched_getaffinity(0)) // self._num_jobs)
        shared = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        # It finds modules where this process does, and no folder of the user's in place of ours. A session of its own,
        # as an interrupt from the keyboard is for this process, which then ends the others.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            env={**shared, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with self._lock:
            self._processes.add(process)
            if self._stopped.is_set():
                process.terminate()
        return process

    def _hand_over(self, process: "subprocess.Popen[str]", job: Job) -> None:
        """Let a process do a run, and tell what it says until it is done, or dead."""
        assert process.stdin is not None and process.stdout is not None
        asked = {"overrides": job.overrides, "unfinished": None if job.unfinished is None else str(job.unfinished)}
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if self._heard(job, json.loads(line)):
                return
        if not self._stopped.is_set():
            code = process.wait()
            self._failed(job, f"its process ended with {_cause(code)}; `--skip-done` goes on with it")

    def _heard(self, job: Job, message: dict[str, Any]) -> bool:
        """Tell one message of a run and return whether it was the last."""
        match message:
            case {"said": str(text)}:
                for line in filter(str.strip, text.splitlines()):
                    self._tell(job, line)
                return False
            case {"run_dir": str(run_dir)}:
                self._done[job.number] = Path(run_dir)
                self._tell(job, f"results in {run_dir}")
            case {"failed": str(text)}:
                self._failed(job, text)
        return True

    def _tell(self, job: Job, line: str) -> None:
        with self._lock:
            self._say(f"[{job.number}/{self._total}] {line}")

    def _failed(self, job: Job, why: str) -> None:
        with self._lock:
            print(f"{_title(job, self._total)}: {why}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        with self._lock:
            self._stopped.set()
            for process in self._processes:
                process.terminate()
        for process in self._processes:
            process.wait()


def _end(process: "subprocess.Popen[str]") -> None:
    """Let a process that has nothing more to do end by itself."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def _cause(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}{' (out of memory?)' if code == -9 else ''}"
