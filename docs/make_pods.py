"""Writes the tables of docs/pods.md: what the paper's two models need on seven slices, with every
program compiled in full.

    python docs/make_pods.py    # 50 minutes of a CPU; needs libtpu (pip install libtpu), no TPU

The text between `<!-- table -->` and `<!-- end -->` is replaced. Plans stay in `runs/plans` and are
not compiled again.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
# A v5e or v6e slice runs a program on one device or on all.
ONE_ENGINE = ["--rollout.one_engine", "yes"]
SLICES = [  # title, experiment, topology, options
    (
        "Qwen3-8B, 64 chips of v5e",
        "dcgrpo_8b_bf16",
        "v5e:8x8",
        [*ONE_ENGINE, "--rollout.slots", "256"],
    ),
    (
        "Qwen3-8B, 16 chips of v6e",
        "dcgrpo_8b_bf16",
        "v6e:4x4",
        [*ONE_ENGINE, "--algorithm.microbatches", "32", "--rollout.slots", "128"],
    ),
    (
        "Qwen3-8B, 32 chips of v6e",
        "dcgrpo_8b_bf16",
        "v6e:4x8",
        [*ONE_ENGINE, "--algorithm.microbatches", "16", "--rollout.slots", "256"],
    ),
    (
        "Qwen3-8B, 16 chips of v5p",
        "dcgrpo_8b_bf16",
        "v5p:2x2x4",
        ["--algorithm.microbatches", "32"],
    ),
    ("Qwen3-8B, 64 chips of v5p", "dcgrpo_8b_bf16", "v5p:4x4x4", []),
    ("Qwen3-30B-A3B, 64 chips of v5p", "dcgrpo_30b_a3b_bf16", "v5p:4x4x4", []),
    ("Qwen3-8B, fp8 engine, 64 chips of v5p", "dcgrpo_8b_fp8", "v5p:4x4x4", []),
    ("Qwen3-30B-A3B, fp8 engine, 64 chips of v5p", "dcgrpo_30b_a3b_fp8", "v5p:4x4x4", []),
    (
        "Qwen3-30B-A3B, 64 chips of v6e",
        "dcgrpo_30b_a3b_bf16",
        "v6e:8x8",
        [*ONE_ENGINE, "--rollout.slots", "512"],
    ),
]


def plan(experiment: str, topology: str, options: list[str]) -> dict:
    """Returns one plan, from a process of its own: a process can load one slice's compiler."""
    file = (
        ROOT
        / "runs"
        / "plans"
        / f"{'_'.join([experiment, topology, *options]).replace(':', '-')}.json"
    )
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [
            pathlib.Path(sys.executable).with_name("dcmdp"),
            "plan",
            f"experiments/pods/{experiment}.py",
            "--topology",
            topology,
            "--json",
            file,
        ]
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, flush=True)
        if done.returncode == 2:
            raise SystemExit(done.stderr)
    return json.loads(file.read_text())


def lines(
    title: str, planned: dict, experiment: str, topology: str, options: list[str]
) -> list[str]:
    """Returns a section: the command, a row per program, and the lower bound of a step."""
    out = [
        f"### {title}",
        "",
        f"    dcmdp plan experiments/pods/{experiment}.py "
        f"--topology {' '.join([topology, *options])}",
        "",
        "| program | arguments | temporaries | peak GiB | fits "
        "| TFLOP | link GB | s a step | compile CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in planned["programs"]:
        cells = [
            p["program"],
            f"{p['arguments'] / GIB:.2f}",
            f"{p['temporaries'] / GIB:.2f}",
            f"{p['peak'] / GIB:.2f}",
            "**no**" if p["excess"] else "yes",
            f"{p['flops'] / 1e12:.3g}",
            f"{p['link'] / 1e9:.3g}",
            f"{p['calls'] * p['seconds']:.3g}",
            f"{p['compile_cpu_seconds']:.0f}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    too_large = [p for p in planned["programs"] if p["excess"]]
    for p in too_large:
        out += ["", f"{p['program']} does not fit: {p['excess']}; change {p['settings']}."]
    tokens = planned["tokens"]
    seconds = sum(p["calls"] * p["seconds"] for p in planned["programs"])
    return [
        *out,
        "",
        f"A constrained step of {tokens:,} sampled tokens takes at least {seconds:.0f} s, "
        f"at most {tokens / seconds / planned['devices']:,.0f} tokens/s a chip.",
        "",
    ]


def main() -> None:
    sections = [line for title, *how in SLICES for line in lines(title, plan(*how), *how)]
    page = ROOT / "docs" / "pods.md"
    before, rest = page.read_text().split("<!-- table -->\n")
    page.write_text(
        f"{before}<!-- table -->\n\n"
        + "\n".join(sections)
        + "<!-- end -->\n"
        + rest.split("<!-- end -->\n")[1]
    )


if __name__ == "__main__":
    main()
