"""What a training run is to the outside: its folder, log and terminal, and the signals to stop."""
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from itertools import count

import torch

from configurator import on_signals


QUIET = 10  # seconds, on a terminal a tenth of it


class Run:
    """
    A run that writes ckpt.pt, log.jsonl and entropy.png into `folder`. From here on a full disk or
    too little memory ends the process with one line. Of several processes that train together
    only the first one, rank 0, logs and says anything.
    """

    def __init__(self, folder, rank=0, ranks=1):
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.ckpt = os.path.join(folder, "ckpt.pt")
        self.best = os.path.join(folder, "best.pt")
        self.path = os.path.join(folder, "log.jsonl")
        self.picture = os.path.join(folder, "entropy.png")
        self.signals = []  # that arrived since open(), for the loop to stop at
        self.track = lambda numbers, step: None
        self.said = time.monotonic()  # when a line was last printed
        sys.excepthook = self.unhandled

    def open(self, resumed_at=None):
        """
        Lock the folder until the process ends, move an earlier run's files aside, or go on with
        those of a run that is resumed after `resumed_at` steps, and keep signals from here on.
        Raises OSError if the folder can't be written or another run has it.
        """
        on_signals(self.on_signal)
        if self.rank:
            return
        os.makedirs(self.folder, exist_ok=True)
        lock(self.folder)
        if resumed_at is None:
            for path in (self.ckpt, self.path, self.picture, self.best):
                move_aside(path)
        elif os.path.exists(self.path):
            trim_log(self.path, resumed_at)
        self.file = open(self.path, "a")

    def track_with(self, log_to, name, settings):
        """Give every record's numbers to TensorBoard or Weights & Biases as well."""
        if log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(self.folder, flush_secs=10)

            def track(numbers, step):
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            self.track = track
        elif log_to == "wandb":
            import wandb
            project = wandb.init(project="entropy-guided-attention", name=name, config=settings)
            self.track = lambda numbers, step: project.log(numbers, step=step)

    def log(self, event, step, **values):
        """Append a record to log.jsonl. Raises OSError with the file and the cause if it can't."""
        if self.rank:
            return
        try:
            print(json.dumps({"event": event, "step": step, **values}), file=self.file, flush=True)
        except OSError as e:
            raise OSError(f"can't write {self.path}: {e.strerror}") from e
        self.track({k: v for k, v in values.items() if type(v) in (int, float)}, step)

    def keep_best(self):
        """Keep the checkpoint just written as best.pt too, whole or not at all."""
        shutil.copyfile(self.ckpt, self.best + ".tmp")
        os.replace(self.best + ".tmp", self.best)

    def say(self, text, file=None, end="\n"):
        """Print a line. A terminal or a pipe that is gone is one more signal, and loses no work."""
        if self.rank:
            return
        file = file or sys.stdout
        self.said = time.monotonic()
        try:
            print(text, file=file, end=end, flush=True)
        except OSError:
            self.signals.append(signal.SIGPIPE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

    def still(self, text):
        """
        Print a line where QUIET seconds have passed without one, so that one sees it go on. On a
        terminal it stands sooner, and the next line is written over it.
        """
        silent = time.monotonic() - self.said
        if sys.stdout.isatty() and silent > QUIET / 10:
            self.say(f"{text:<40}", end="\r")  # over a longer one as well
        elif silent > QUIET:
            self.say(text)

    def what_is_left(self):
        if os.path.isfile(self.ckpt):
            return f"The last good checkpoint stays in {self.ckpt}, for --init_from=resume"
        return "No checkpoint was written yet"

    def on_signal(self, number, frame):
        if self.signals and self.ranks == 1:
            sys.exit(128 + number)  # asked twice; torchrun hands on what its children had as well
        self.signals.append(number)
        self.say("\nstopping after this step (again to stop at once)", sys.stderr)

    def unhandled(self, kind, error, trace):
        """sys.excepthook: what a user can cause is a line, all else is as Python shows it."""
        lost = self.ranks > 1 and "by peer" in str(error)
        self.rank = self.rank if lost else 0  # any process tells of an error of its own
        if lost:
            error = "another process of this run has ended"
        elif "DefaultCPUAllocator" in str(error) or kind in (MemoryError, torch.OutOfMemoryError):
            error = ("out of memory: a smaller batch_size with a larger grad_accum trains the same "
                     "in less")
        elif not issubclass(kind, OSError):
            return sys.__excepthook__(kind, error, trace)
        self.say(f"error: {error}. {self.what_is_left()}", sys.stderr)
        os._exit(1)  # an orderly end would try once more to write what could not be written


def lock(folder):
    """Keep `folder` for this process until it ends. Raises OSError if another one has it."""
    handle = os.open(folder, os.O_RDONLY)  # never closed: the lock is the handle's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another train.py is writing there: wait for it, or name another --out_dir")
    except OSError:
        pass  # a file system without locks


def move_aside(path):
    """Rename an earlier run's file, so that nothing is overwritten."""
    if os.path.exists(path):
        aside = next(f"{path}.old{n}" for n in count(1) if not os.path.exists(f"{path}.old{n}"))
        os.replace(path, aside)
        print(f"{path} was there: moved to {aside}")


def trim_log(path, step):
    """
    Leave in a log.jsonl the records of the first `step` steps: a run may have gone on after its
    checkpoint was written, or ended in half a line. What is no record of a step goes, too.
    """
    def belongs(line):
        try:
            record = json.loads(line)
            early = record["step"] < step or record["step"] == step and record["event"] == "step"
        except (ValueError, KeyError, TypeError):
            return False
        return early and line.endswith(b"\n")

    with open(path, "r+b") as file:
        lines = [line for line in file if belongs(line)]
        file.seek(0)
        file.writelines(lines)  # the same bytes as far as nothing was damaged
        file.truncate()
