"""Does a gap of the paper's size, made by a real engine, cost anything, and does DC-GRPO help?

llama.cpp with Q4_0 weights (all matrices, its own kernels with 8-bit activations) and an f16 cache
samples; it is given a new file after each step. `exact` is GRPO sampled by the library's engine in
float32. The model and the learning rate are those of real_engine.py; runs are 30 steps long, so
that three seeds fit in an hour of a loaded machine.

Compared, as fixed before the first run: the engine's held-out pass rate at step 30, in pairs of one
seed, `grpo` with `exact` (what the gap costs) and `dcgrpo` with `grpo` (what the constraint
changes). A difference counts as shown where the 95 % interval over the three seeds leaves out 0.
Delta is compared with the run's own tolerance, 1.2 times its floor at the start. No other seed,
length, format or tolerance is tried.

Command:  bash benchmarks/engines/install_llama_cpp.sh;
          PYTHONPATH=. dcmdp study experiments/laptop/llama_cpp_q4.py --workers 1
Hardware: two CPU cores
Time:     6 to 18 minutes a seed, as loaded as the machine is, after its warm-up
Result:   engine's pass rate at first 0.31 to 0.41, then 0.75, 0.80 and 0.43 (exact), 0.63, 0.76 and
          0.53 (grpo), 0.60, 0.68 and 0.41 (dcgrpo), so that neither comparison leaves out 0; delta
          grows from 0.0048 to 0.0081 without the constraint and to 0.0091 with it
"""

import dataclasses
import pathlib
import tempfile

from chain import FLOAT32, with_dual, with_engine
from real_engine import EXACT

from benchmarks.engines import llama_cpp_server
from benchmarks.engines.process import free_port
from dcmdp_jax import constraint
from dcmdp_jax.config import Calibrated, EvalConfig
from dcmdp_jax.rollout import llama_cpp, server_sampler
from dcmdp_jax.rollout.http_client import Client
from dcmdp_jax.tools.study import Study

FORMAT = ("--weights", "Q4_0", "--cache", "f16", "--slots", "128", "--context", "64")


class Reloading(llama_cpp.Server):
    """A llama.cpp server of this process, which serves each update's weights in `FORMAT`."""

    loads_weights = True

    def __init__(self):
        self._port = free_port()
        self._process = None
        self._label = None
        self.client = Client(f"http://127.0.0.1:{self._port}", "llama.cpp", connections=128)

    def load(self, folder, label, should_stop):
        if self._process is None:
            log = pathlib.Path(tempfile.gettempdir(), f"llama_cpp-{self._port}.log")
            self._process = llama_cpp_server.Server(folder, FORMAT, self._port, log=log)
        else:
            self._process.serve(folder)
        self._label = label

    def label(self, should_stop):
        return self._label


def sampler(config, model, tokenizer, mesh):
    return server_sampler.of_run(config, model, tokenizer, Reloading())


SHORT = dataclasses.replace(EXACT, eval=EvalConfig(every=10, prompts=512), steps=30)
SAMPLED = with_engine(SHORT, FLOAT32, sampler=sampler)

STUDY = Study(
    {
        "exact": SHORT,
        "grpo": SAMPLED,
        "dcgrpo": with_dual(
            constraint.shape_advantage,
            tolerance=Calibrated(slack=0.2),
            multiplier_max=1.0,
            config=SAMPLED,
        ),
    },
    seeds=3,
)
