"""A program's command line, its stop signals and its end."""

import atexit
import gc
import multiprocessing.util  # whose own exit handler must be there before ours: the last one runs first
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
    """Within it SIGTERM, SIGINT and, without nohup, SIGHUP (of a closed terminal) only set `received`, which the loop
    reads after a step. Launchers and batch systems send them twice, so after the first they stay harmless to the end; a
    second Ctrl-C, two seconds later, acts."""

    def __enter__(self):
        self.received, self.at = None, 0.0
        kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self.previous = {s: signal.signal(s, self._handle) for s in STOPS[kept:]}
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
    """worker_init_fn of a DataLoader: terminals and batch systems signal the whole process group, and the step that is
    being finished needs its data."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Python would wait forever for loader workers at exit: they ignore the SIGTERM with which it ends its daemons."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(end_workers)


def launch(main, config, aliases=None, accepted=None, partial=False):
    """Run main(config of the command line). A user's mistake ends it with one line and exit code 2, a defect of ours
    with a traceback; where a training was under way, its last complete step is saved first. `accepted`, `partial`: see
    parse_config. --plan 24 is --check with the plan for a card of 24 GB."""
    global run
    rank, cfg = int(os.environ.get("RANK", 0)), None
    if hasattr(sys.stdout, "reconfigure"):  # a log file has a line when it is said; a terminal in EUC-KR knows no emoji
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
        time.sleep(5 if rank else 0)  # by then rank 0 has said the same, and torchrun has ended this one
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {text}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # no thread, worker or process group may change the exit code or hold it up
    if dist.is_initialized():
        run.sum(0)  # rank 0 may be merging: NCCL's own barrier would give up after 10 minutes
    run = None
    if dist.is_initialized():
        gc.collect()  # a DDP reducer that outlives the process group would join gloo's threads with Python's lock held
        dist.destroy_process_group()


def _explain(error, cfg):
    """One line for what a user can change; None for a defect."""
    text = str(error).strip()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search("out of memory|CPUAllocator", text):
        where = "The host is" if isinstance(error, MemoryError) or "CPUAllocator" in text else "CUDA"
        return f"{where} out of memory ({text.partition(chr(10))[0]}). {plan.advice(cfg)}"
    if dist.is_initialized() and re.search("Connection (closed|reset) by peer|writev.*Broken pipe", text):
        return "another process of this training ended first: its message says why"
    known = isinstance(error, (UserError, PermissionError, NotADirectoryError, FileExistsError))
    return text if known or re.search("No space left|Read-only file system|File name too long", text) else None
