"""Runs an experiment on Cloud TPU from a workstation, by the commands of gcloud.

A queued resource holds one slice, or several. Its hosts get the files of the checkout, the packages
of its lock and the run's secret, and each starts `dcmdp train --distributed`, which does not end
with the connection. The log of process 0 is shown. If the machines are taken away, others are
requested, and the run goes on from its last checkpoint, which lies in a bucket.
"""

from __future__ import annotations

import pathlib
import posixpath
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

LOCK = "requirements-tpu.txt"
PYTHON = "3.11"  # that of the lock
# the system images of TPU VMs, from https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
POLL_SECONDS = 30.0
LOOKS = 5  # at the state, after a run has ended early: a preemption shows late
REFUSED = 2  # exit status of a run on bad input
ALL = ("--node=all", "--worker=all")
FIRST = ("--node=0", "--worker=0")  # the host of process 0
RUNNING = 'kill -0 "$(cat dcmdp.pid)"'
FOLLOW = 'tail -n 100 -F --pid="$(cat dcmdp.pid)" dcmdp.log; exit "$(cat dcmdp.status || echo 1)"'


class CommandFailed(Exception):
    """A command ended with another status than 0."""


class Launch(NamedTuple):
    """What runs, and where."""

    name: str  # of the queued resource
    zone: str
    project: str  # empty: gcloud's own
    accelerator_type: str  # in Google's words, such as v5p-128
    runtime: str  # system image of the hosts
    slices: int
    spot: bool
    checkout: pathlib.Path
    experiment: str  # path in the checkout
    workdir: str  # address of the run
    options: tuple[str, ...]  # of `dcmdp train`
    output: pathlib.Path  # folder that gets the report
    restarts: int
    delete: bool  # the queued resource, at the end


def checkout_of(experiment: str) -> pathlib.Path:
    """Returns the folder above an experiment file that has the lock of the hosts.

    Raises ValueError if there is none.
    """
    for folder in pathlib.Path(experiment).resolve().parents:
        if (folder / LOCK).is_file():
            return folder
    raise ValueError(
        f"experiment {experiment} lies in no checkout of this repository (no folder above it has "
        f"{LOCK}), and the hosts get the checkout; put it under experiments/"
    )


def runtime_of(accelerator_type: str) -> str:
    """Returns the system image for a type such as v5p-128. Raises ValueError on an unknown one."""
    kind = accelerator_type.partition("-")[0]
    if kind not in RUNTIMES:
        raise ValueError(
            f"--accelerator-type {accelerator_type} is none of {', '.join(RUNTIMES)} with a number "
            "of cores or chips, such as v5p-128 or v6e-64; later TPUs are rented through GKE "
            "(experiments/pods/jobset.yaml)"
        )
    return RUNTIMES[kind]


def _tpus(launch: Launch, verb: str, *words: str) -> list[str]:
    where = [f"--zone={launch.zone}"]
    if launch.project:
        where.append(f"--project={launch.project}")
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]


def _state(launch: Launch) -> list[str]:
    """The command that prints the resource's state, and nothing if there is no such resource."""
    named = f"--filter=name~/queuedResources/{launch.name}$"
    return _tpus(launch, "list", named, "--format=value(state.state)")


def _create(launch: Launch) -> list[str]:
    nodes = [f"--node-id={launch.name}"]
    if launch.slices > 1:
        nodes = [f"--node-count={launch.slices}", f"--node-prefix={launch.name}"]
    return _tpus(
        launch,
        "create",
        launch.name,
        *nodes,
        f"--accelerator-type={launch.accelerator_type}",
        f"--runtime-version={launch.runtime}",
        *(["--spot"] if launch.spot else []),
    )


def _delete(launch: Launch) -> list[str]:
    return _tpus(launch, "delete", launch.name, "--force", "--quiet")


def _ssh(launch: Launch, hosts: tuple[str, str], command: str) -> list[str]:
    return _tpus(launch, "ssh", launch.name, *hosts, f"--command={command}")


def _pack(launch: Launch) -> list[str]:
    """Archives the files that git does not ignore, and makes a secret."""
    checkout = shlex.quote(str(launch.checkout))
    folder = shlex.quote(str(_folder(launch)))
    return [
        "bash",
        "-c",
        f"set -o pipefail && umask 077 && mkdir -p {folder} && "
        f"git -C {checkout} ls-files -z --cached --others --exclude-standard | "
        f"tar -C {checkout} --null -T - -czf {folder}/dcmdp.tar.gz && "
        f"openssl rand -hex 32 > {folder}/dcmdp.secret",
    ]


def _folder(launch: Launch) -> pathlib.Path:
    return launch.checkout / "runs" / "launch" / launch.name


def _copy(launch: Launch) -> list[str]:
    files = [str(_folder(launch) / name) for name in ("dcmdp.tar.gz", "dcmdp.secret")]
    return _tpus(launch, "scp", *files, f"{launch.name}:", *ALL)


def _forget_secret(launch: Launch) -> list[str]:
    return ["rm", str(_folder(launch) / "dcmdp.secret")]


def _install(launch: Launch) -> list[str]:
    """Unpacks and installs on every host, where a process of an earlier run is ended."""
    steps = [
        '{ kill -KILL -- "-$(cat dcmdp.pid)" || true; } 2> /dev/null',
        "rm -rf dcmdp.pid dcmdp.status dcmdp_jax",
        "mkdir dcmdp_jax",
        "tar -xzf dcmdp.tar.gz -C dcmdp_jax",
        "{ [ -x .local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; }",
        "cd dcmdp_jax",
        f"../.local/bin/uv venv -q --python {PYTHON} .venv",
        f"../.local/bin/uv pip install -q --no-deps -r {LOCK}",
        "../.local/bin/uv pip install -q --no-deps -e .",
    ]
    return _ssh(launch, ALL, " && ".join(steps))


def _start(launch: Launch) -> list[str]:
    """Starts the run on every host; one that has started it already, when gcloud asks again, is
    left alone.
    """
    train = shlex.join(
        [
            ".venv/bin/dcmdp",
            "train",
            launch.experiment,
            "--workdir",
            launch.workdir,
            *launch.options,
            "--distributed",
        ]
    )
    cache = shlex.quote(_cache(launch))
    run = (
        f'cd dcmdp_jax && DCMDP_SECRET="$(cat ../dcmdp.secret)" JAX_COMPILATION_CACHE_DIR={cache} '
        f"{train}; echo $? > ../dcmdp.status"
    )
    detached = f"setsid bash -c {shlex.quote(run)} > dcmdp.log 2>&1 < /dev/null &"
    return _ssh(
        launch, ALL, f"{{ {RUNNING}; }} 2> /dev/null || {{ {detached} echo $! > dcmdp.pid; }}"
    )


def _cache(launch: Launch) -> str:
    """Returns the folder of compiled programs, which the runs of a folder share."""
    return f"{posixpath.dirname(launch.workdir)}/compiled"


def _pull(launch: Launch) -> list[str]:
    names = ("report.html", "metrics.jsonl", "config.json")
    files = [f"{launch.workdir}/{name}" for name in names]
    return ["gcloud", "storage", "cp", *files, f"{launch.output}/"]


def dry_run(launch: Launch) -> str:
    """Returns the commands of a run, a line each, as a shell reads them."""
    commands: list[tuple[list[str], str]] = [
        (_state(launch), "until it says ACTIVE"),
        (_delete(launch), "if it says SUSPENDED, after a preemption"),
        (_create(launch), "if it says nothing: there is none"),
        (_ssh(launch, FIRST, RUNNING), "the next five are for a run that does not run yet"),
        (_pack(launch), ""),
        (_copy(launch), ""),
        (_forget_secret(launch), ""),
        (_install(launch), ""),
        (_start(launch), f"keeps compiled programs in {_cache(launch)}, for runs beside this one"),
        (_ssh(launch, FIRST, FOLLOW), "shows the log until the run ends"),
        (["mkdir", "-p", str(launch.output)], ""),
        (_pull(launch), ""),
    ]
    if launch.delete:
        commands.append((_delete(launch), ""))
    return "\n".join(f"{shlex.join(words)}{f'  # {why}' if why else ''}" for words, why in commands)


def run(launch: Launch) -> int:
    """Runs it to its end, and returns the exit status of process 0, or 1 if a command fails."""
    remains = True
    try:
        status = _run(launch)
        if status == 0:
            launch.output.mkdir(parents=True, exist_ok=True)
            _call(_pull(launch))
            _say(f"see {launch.output / 'report.html'}")
        if launch.delete:
            _call(_delete(launch))
            remains = False
    except CommandFailed as error:
        _say(str(error))
        status = 1
    except KeyboardInterrupt:
        _say(f"the run on {launch.name} goes on; the same command shows its log again")
        return 130
    if remains:
        _say(f"{launch.name} costs until it is deleted: {shlex.join(_delete(launch))}")
    return status


def _run(launch: Launch) -> int:
    """Returns the exit status of process 0, with new machines after each preemption."""
    _make_active(launch)
    running = _succeeds(_ssh(launch, FIRST, RUNNING))
    preemptions = 0
    while True:
        status = _attempt(launch, running)
        if status in (0, REFUSED):
            return status
        _say(f"ended with status {status}; waiting to see whether {launch.name} was preempted")
        if _remains(launch):
            running = _succeeds(_ssh(launch, FIRST, RUNNING))
            if not running:
                return status
            _say("the connection was lost, and the run goes on")
            continue
        if preemptions == launch.restarts:
            raise CommandFailed(
                f"{launch.name} was preempted {preemptions + 1} times; the same command goes on, "
                "and --restarts allows more"
            )
        preemptions += 1
        _say(f"{launch.name} was preempted; the run goes on when there are other machines")
        _make_active(launch)
        running = False


def _attempt(launch: Launch, running: bool) -> int:
    """Installs and starts the run, unless it runs, and shows its log to its end."""
    commands = [_pack(launch), _copy(launch), _forget_secret(launch)]
    commands += [_install(launch), _start(launch)]
    for command in [] if running else commands:
        if status := subprocess.call(command):
            return status
    return subprocess.call(_ssh(launch, FIRST, FOLLOW))


def _make_active(launch: Launch) -> None:
    """Waits until the machines are there; requests them if there are none."""
    said = ""
    while (state := _call_for_text(_state(launch))) != "ACTIVE":
        if state == "FAILED":
            described = shlex.join(_tpus(launch, "describe", launch.name))
            raise CommandFailed(
                f"the request {launch.name} FAILED; see why with {described}, and delete it with "
                f"{shlex.join(_delete(launch))}"
            )
        if state == "SUSPENDED":
            _call(_delete(launch))
        elif not state:
            _call(_create(launch))
        else:
            if state != said:
                _say(f"{launch.name} is {state}")
            said = state
            time.sleep(POLL_SECONDS)


def _remains(launch: Launch) -> bool:
    """True if the machines are still there after a while."""
    for _ in range(LOOKS):
        if _call_for_text(_state(launch)) != "ACTIVE":
            return False
        time.sleep(POLL_SECONDS)
    return True


def _call(command: list[str]) -> None:
    """Runs a command. Raises CommandFailed if it fails."""
    if status := subprocess.call(command):
        raise CommandFailed(f"`{shlex.join(command)}` ended with status {status}")


def _call_for_text(command: list[str]) -> str:
    """Returns what a command prints. Raises CommandFailed if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CommandFailed(f"`{shlex.join(command)}` ended with status {done.returncode}")
    return done.stdout.strip()


def _succeeds(command: list[str]) -> bool:
    return subprocess.call(command, stderr=subprocess.DEVNULL) == 0


def _say(text: str) -> None:
    print(f"dcmdp launch: {text}", file=sys.stderr, flush=True)
