"""Writes the tables of docs/pods.md: what the paper's two models need on seven slices, each program
compiled in full.

    python docs/make_pods.py            # fifty minutes of a CPU; needs libtpu (pip install libtpu),
    no TPU

Between `<!-- table -->` and `<!-- end -->` everything is this script's. Plans are kept in
`runs/plans`, and not made again.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
WHOLE = ["--rollout.one_engine", "yes"]  # a v5e or v6e slice runs programs on one device or on all
SLICES = [  # title, experiment, topology, options
    ("Qwen3-8B, v5e-64", "dcgrpo_8b_bf16", "v5e:8x8", [*WHOLE, "--rollout.slots", "256"]),
    (
        "Qwen3-8B, v6e-16",
        "dcgrpo_8b_bf16",
        "v6e:4x4",
        [*WHOLE, "--algorithm.microbatches", "32", "--rollout.slots", "128"],
    ),
    (
        "Qwen3-8B, v6e-32",
        "dcgrpo_8b_bf16",
        "v6e:4x8",
        [*WHOLE, "--algorithm.microbatches", "16", "--rollout.slots", "256"],
    ),
    ("Qwen3-8B, v5p-16", "dcgrpo_8b_bf16", "v5p:2x2x4", ["--algorithm.microbatches", "32"]),
    ("Qwen3-8B, v5p-64", "dcgrpo_8b_bf16", "v5p:4x4x4", []),
    ("Qwen3-30B-A3B, v5p-64", "dcgrpo_30b_a3b_bf16", "v5p:4x4x4", []),
    ("Qwen3-8B, fp8 engine, v5p-64", "dcgrpo_8b_fp8", "v5p:4x4x4", []),
    ("Qwen3-30B-A3B, fp8 engine, v5p-64", "dcgrpo_30b_a3b_fp8", "v5p:4x4x4", []),
    ("Qwen3-30B-A3B, v6e-64", "dcgrpo_30b_a3b_bf16", "v6e:8x8", [*WHOLE, "--rollout.slots", "512"]),
]


def plan(experiment: str, topology: str, options: list[str]) -> dict:
    """One plan, in a process of its own: a slice's compiler is loaded once."""
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


def lines(title: str, found: dict, experiment: str, topology: str, options: list[str]) -> list[str]:
    """A section: the command, a row per program, and the step at the roof."""
    out = [
        f"### {title}",
        "",
        f"    dcmdp plan experiments/pods/{experiment}.py --topology {' '.join([topology, *options])}",
        "",
        "| program | arguments | temporaries | peak GiB | fits | TFLOP | link GB | s a step | compile CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found["programs"]:
        cells = [
            p["program"],
            f"{p['arguments'] / GIB:.2f}",
            f"{p['temporaries'] / GIB:.2f}",
            f"{p['peak'] / GIB:.2f}",
            "yes" if p["fits"] else "**no**",
            f"{p['flops'] / 1e12:.3g}",
            f"{p['link'] / 1e9:.3g}",
            f"{p['calls'] * p['seconds']:.3g}",
            f"{p['compile_cpu_seconds']:.0f}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    whole = sum(p["calls"] * p["seconds"] for p in found["programs"])
    return [
        *out,
        "",
        f"A constrained step of {found['tokens']:,} sampled tokens: {whole:.0f} s at the roof, "
        f"{found['tokens'] / whole / found['devices']:,.0f} tokens/s a chip.",
        "",
    ]


def main() -> None:
    made = [line for title, *how in SLICES for line in lines(title, plan(*how), *how)]
    page = ROOT / "docs" / "pods.md"
    before, rest = page.read_text().split("<!-- table -->\n")
    page.write_text(
        f"{before}<!-- table -->\n\n"
        + "\n".join(made)
        + "<!-- end -->\n"
        + rest.split("<!-- end -->\n")[1]
    )


if __name__ == "__main__":
    main()
