"""This package beside its peers, interleaved: `PEERS=FOLDER python -m benchmarks.peers.compare [T1
T2 T3 T4 T5] [--workload W1]`.

Prints CPU seconds of each, those of the quickest peer over ours, and how far its log-probs (T2: its
loss) lie from the harness's float64. PEERS names the folder of the harness, see `run_ours.py`;
vLLM runs in the environment that `benchmarks/engines/install_vllm.sh` makes, and `w4.py` adds
workload W4. What is not installed has no result.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.engines import vllm_server

HERE = pathlib.Path(__file__).resolve().parent
# a name, and what runs it
VLLM = f"vllm={vllm_server.PYTHON}:run_vllm.py"
PEERS = {
    "T1": ("tunix", "torch:plain"),
    "T2": ("tunix", "torch"),
    "T3": ("tunix", "llama", VLLM),
    "T4": ("torch:cb", "llama", VLLM),
}
PEERS_W4 = tuple(
    f"{name}={environment}/bin/python:{HERE / f'w4_{name}.py'}"
    for name, environment in (("tunix", "tx"), ("trl", "th"))
)
WORKLOADS = {
    "T1": ("W1", "W2", "W3", "W4"),
    "T2": ("W1", "W3", "W4"),
    "T3": ("W1", "W2", "W3"),
    "T4": ("W1", "W3"),
    "T5": ("W4",),
}
ERRORS = ("rescore_max_abs_err", "max_abs_err_vs_fp64", "loss_err")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=["T3", "T4"])
    parser.add_argument("--workload", help="this one alone")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cpu", default="0", help="core to run on")
    args = parser.parse_args()
    unknown = set(args.tasks) - set(WORKLOADS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: the tasks are {', '.join(WORKLOADS)}")
    for task in args.tasks:
        if args.workload not in (None, *WORKLOADS[task]):
            parser.error(
                f"{args.workload}: the workloads of {task} are {', '.join(WORKLOADS[task])}"
            )
    compare(args.tasks, args.rounds, args.cpu, args.workload)


def compare(tasks: list[str], rounds: int, cpu: str, only: str | None = None) -> None:
    """Prints a line for each workload of `tasks`, or for the one named.

    If PEERS is not set, it prints how to set it.
    """
    if not os.environ.get("PEERS"):
        print(
            "peers    set PEERS to the folder of the peer harness (ab.py) to print the ratios to "
            "other engines"
        )
        return
    folder = pathlib.Path(os.environ["PEERS"]).resolve()
    if not (folder / "ab.py").is_file():
        raise SystemExit(f"{folder} holds no ab.py; set PEERS to the folder of the peer harness")
    for task in tasks:
        for workload in [name for name in WORKLOADS[task] if only in (None, name)]:
            print(line(workload, task, measured(folder, workload, task, rounds, cpu)), flush=True)


def peers(workload: str, task: str) -> tuple[str, ...]:
    """Returns whom this package stands beside, as `ab.py` has them."""
    return PEERS_W4 if workload == "W4" else PEERS[task]


def measured(folder: pathlib.Path, workload: str, task: str, rounds: int, cpu: str) -> list[dict]:
    """Returns what `ab.py` reports of each peer and, last, of this package."""
    script = HERE / "run_ours.py"
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch, "out.json")
        run = subprocess.run(
            [
                sys.executable,
                "ab.py",
                "--workload",
                workload,
                "--task",
                task,
                "--rounds",
                str(rounds),
                "--cpu",
                cpu,
                "--out",
                str(out),
                *peers(workload, task),
                f"ours={sys.executable}:{script}",
            ],
            cwd=folder,
            env=os.environ
            | {
                "PEERS": str(folder),
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": cpu,
            },
            stdout=subprocess.DEVNULL,
        )
        if run.returncode or not out.exists():
            raise SystemExit(
                f"ab.py ended with status {run.returncode}; its workers' messages are in "
                f"{folder / 'logs'}"
            )
        return json.loads(out.read_text())


def line(workload: str, task: str, results: list[dict]) -> str:
    """Returns `results` of `measured` in one line; a peer without figures is named as such."""
    seconds = {r["label"]: r["cpu_median_s"] for r in results if "cpu_median_s" in r}
    if "ours" not in seconds:
        return (
            f"peers    {workload} {task}: ours gave no result; logs/ab_ours.err of the harness "
            "has the reason"
        )
    others = {label: s for label, s in seconds.items() if label != "ours"}
    names = [peer.split("=")[0] for peer in peers(workload, task)]
    failed = [name for name in names if name not in others]
    shown = [
        f"{result['label']} {result['cpu_median_s']:.3f} s{error(result)}"
        for result in results
        if "cpu_median_s" in result
    ] + [f"{name} no result" for name in failed]
    ratio = f"{min(others.values()) / seconds['ours']:.2f}x the quickest peer; " if others else ""
    return f"peers    {workload} {task}: {ratio}{', '.join(shown)}"


def error(result: dict) -> str:
    """Returns how far a peer's numbers lie from the harness's float64, in brackets."""
    digest = result.get("digest", {})
    found = [f"{digest[name]:.1e}" for name in ERRORS if name in digest]
    return f" (within {found[0]})" if found else ""


if __name__ == "__main__":
    main()
