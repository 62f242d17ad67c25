"""dcmdp with one fault: `python faulty.py PHASE NUMBER SIGNAL NOTE WORDS...`.

When the process comes to PHASE for the NUMBER-th time it writes the time to NOTE and sends itself
SIGNAL.
"""

import os
import pathlib
import sys
import time

from dcmdp_jax import cli, compiled_step, rewards, sync
from dcmdp_jax.evaluation import held_out
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.report import run_page
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.run import checkpoint, warmup

# Where a phase is entered; of `update` and `sync` what these functions make is what is called.
ENTRIES = {
    "warm-up": (warmup, "run"),
    "rollout": (JetStreamSampler, "sample"),
    "reward": (rewards, "score"),
    "update": (compiled_step, "compile_step"),
    "sync": (sync, "converter"),
    "evaluation": (held_out, "sample"),
    "log": (metrics.Log, "write"),
    "save": (checkpoint.Checkpoints, "save"),
    "saving": (checkpoint.Checkpoints, "save"),
    "restore": (checkpoint.Checkpoints, "restore"),
    "report": (run_page, "write"),
}
MAKERS = ("update", "sync")
# A step of the tests' model is over before the disk has taken the checkpoint before it, which a
# real one outlasts.
SETTLED = 2.0


def main(phase: str, number: str, signal: str, note: str, *words: str) -> int:
    home, name = ENTRIES[phase]
    calls = []

    def count() -> None:
        calls.append(None)
        if len(calls) == int(number):
            if phase != "saving":
                time.sleep(SETTLED)
            pathlib.Path(note).write_text(str(time.time()))
            os.kill(os.getpid(), int(signal))

    def counted(function):
        def entered(*args, **options):
            if phase != "saving":
                count()
            result = function(*args, **options)
            if phase == "saving":  # the disk is being written
                count()
            return result

        return entered

    original = getattr(home, name)
    if phase in MAKERS:
        setattr(home, name, lambda *args, **options: counted(original(*args, **options)))
    else:
        setattr(home, name, counted(original))
    return cli.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
