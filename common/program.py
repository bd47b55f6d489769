"""How a program starts and ends: launch(main, Config) for the command line and errors, StopSignal for Ctrl-C."""

import atexit
import gc
import multiprocessing.util  # first: exit handlers run in reverse, and its own must run after end_workers
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import UserError, plan
from common.config import parse_config

STOPS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
run = None  # the common.run.Run of this process


class StopSignal:
    """Context in which SIGTERM, SIGINT and, without nohup, SIGHUP (a closed terminal) only set `received`, which the
    loop reads after every step. Launchers and batch systems send them twice, so after the first they stay ignored until
    the process ends; a second Ctrl-C, two seconds later, interrupts."""

    def __enter__(self):
        self.received, self.at = None, 0.0
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self.previous = {s: signal.signal(s, self._handle) for s in STOPS[nohup:]}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items() if self.received is None else ():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received == "SIGINT" and time.monotonic() - self.at > 2:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.at = signal.Signals(number).name, time.monotonic()


def ignore_stop_signals(worker):
    """worker_init_fn of a DataLoader. Terminals and batch systems signal the whole process group, but the step that is
    being finished still needs its data."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill loader workers. Python ends its daemons with SIGTERM at exit, which they ignore, and would wait forever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(end_workers)


def launch(main, config, aliases=None, accepted=None, partial=False):
    """Run main(cfg) with the `config` of the command line. A user's mistake ends it with one line and exit code 2, a
    defect of ours with a traceback; a training saves its last complete step first. `aliases` to `partial`: see
    parse_config. --plan 24 is --check with the plan for a GPU of 24 GB."""
    global run
    rank, cfg = int(os.environ.get("RANK", 0)), None
    if hasattr(sys.stdout, "reconfigure"):  # log files get every line at once; a terminal in EUC-KR has no emoji
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        argv, plan.card = plan.asked_card(sys.argv[1:]) if hasattr(config, "check") else (sys.argv[1:], None)
        cfg = parse_config(config, argv, aliases, partial, accepted)
        if plan.card is not None:
            cfg.check = True
        main(cfg)
    except Exception as error:
        if run is not None:
            run.save_after_error()
        text = _explain(error, cfg)
        if text is None:
            raise
        end_workers()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 if rank else 0)  # by then rank 0 has printed the same, and torchrun has ended this process
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        os._exit(2)  # no thread, worker or process group may change the exit code or block the end
    if dist.is_initialized():
        run.sum(0)  # a barrier: rank 0 may be merging for longer than NCCL's own would wait (10 minutes)
    run = None
    if dist.is_initialized():
        gc.collect()  # a DDP reducer that outlives the process group would join gloo's threads with Python's lock held
        dist.destroy_process_group()


def _explain(error, cfg):
    """-> one line for what a user can change; None for a defect."""
    text = str(error).strip()
    known = isinstance(error, (UserError, PermissionError, NotADirectoryError, FileExistsError))
    if known or re.search("No space left|Read-only file system|File name too long", text):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search("out of memory|CPUAllocator", text):
        where = "The host is" if isinstance(error, MemoryError) or "CPUAllocator" in text else "CUDA"
        return f"{where} out of memory ({text.partition(chr(10))[0]}). {plan.advice(cfg)}"
    if text.startswith("DataLoader worker ("):  # in a validation; a training's are Run._fetch's
        return f"DataLoader worker crashed: {text}. Lower num_workers, or load in the main process: --num_workers 0"
    peer_gone = dist.is_initialized() and re.search("Connection (closed|reset) by peer|writev.*Broken pipe", text)
    return "another process of this training ended first: its message says why" if peer_gone else None
