"""A stand-in for gcloud that runs what it is asked for on hosts that are folders.

Put on PATH as `gcloud`. $CLOUD is its folder: `calls` gets a line for each call, `state` is the
queued resource's, `hosts` has a home for each host, and `ends` the exit statuses of the runs to
come, each with the state that the resource has afterwards.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ.get("CLOUD", ""))
STATE = CLOUD / "state"
HOSTS = CLOUD / "hosts"
UV = """#!/usr/bin/env bash
set -e
[ -s requirements-tpu.txt ]
echo "$PWD $*" >> $CLOUD/uv
if [ $1 = venv ]; then mkdir -p .venv/bin; cp $CLOUD/dcmdp .venv/bin/dcmdp; fi
"""
DCMDP = """#!/usr/bin/env python3
import json, os, pathlib, sys
cloud = pathlib.Path(os.environ["CLOUD"])
host = pathlib.Path.cwd().parent.name
run = {"host": host, "secret": os.environ["DCMDP_SECRET"], "arguments": sys.argv[1:]}
run["experiment"] = pathlib.Path(sys.argv[2]).read_text()
with (cloud / "runs").open("a") as runs:
    runs.write(json.dumps(run) + "\\n")
if host != "0-0":
    sys.exit(0)
print("step 1", flush=True)
status, state, *others = (cloud / "ends").read_text().split()
(cloud / "ends").write_text(" ".join(others))
(cloud / "state").write_text(state)
sys.exit(int(status))
"""


def create(words: list[str]) -> None:
    """Makes two hosts for each node."""
    counts = [word.partition("=")[2] for word in words if word.startswith("--node-count=")]
    for node in range(int(counts[0]) if counts else 1):
        for worker in range(2):
            program = HOSTS / f"{node}-{worker}" / ".local" / "bin" / "uv"
            program.parent.mkdir(parents=True)
            program.write_text(UV)
            program.chmod(0o755)
    STATE.write_text("ACTIVE")


def targets(words: list[str]) -> list[pathlib.Path]:
    """Returns the homes of the hosts that a call is for."""
    if "--worker=all" in words:
        return sorted(HOSTS.iterdir())
    return [HOSTS / "0-0"]


def ssh(words: list[str]) -> int:
    """Runs the command on the hosts and returns the first status that is not 0."""
    [command] = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    if command.startswith("kill -0") and (CLOUD / "running").exists():
        return 0
    statuses = [
        subprocess.call(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)})
        for home in targets(words)
    ]
    return next((status for status in statuses if status), 0)


def main(words: list[str]) -> int:
    """Does one call."""
    with (CLOUD / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[:2] == ["storage", "cp"]:
        for address in words[2:-1]:
            (pathlib.Path(words[-1]) / address.rpartition("/")[2]).write_text(address)
        return 0
    verb, words = words[3], words[4:]
    if verb == "list":
        print(STATE.read_text() if STATE.exists() else "")
    elif verb == "create":
        create(words)
    elif verb == "delete":
        shutil.rmtree(HOSTS)
        STATE.unlink()
    elif verb == "scp":
        files = [word for word in words if word.startswith("/")]
        for home in targets(words):
            for file in files:
                shutil.copy(file, home)
    else:
        return ssh(words)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
