"""What do the studies add up to? Makes every table and picture of RESULTS.md anew, after copying
what the runs left, if named.

Command:  python experiments/laptop/results.py [runs/laptop]
Hardware: any; needs matplotlib (pip install 'dcmdp-jax[report]')
Time:     1.3 s
Result:   RESULTS.md and its 5 pictures in experiments/laptop/plots
"""

import csv
import json
import pathlib
import shutil
import sys

import plots
import tables

from dcmdp_jax import calibrate

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "RESULTS.md"


def collect(runs):
    """Copies what the studies and probes under `runs` left: STUDY/table.csv as STUDY.csv, the
    probes' own tables, and measured tolerances.
    """
    for table in sorted(runs.glob("*/table.csv")):
        shutil.copyfile(table, HERE / "results" / f"{table.parent.name}.csv")
    for table in sorted(runs.glob("*.csv")):
        shutil.copyfile(table, HERE / "results" / table.name)
    write_tolerances(runs)


def write_tolerances(runs):
    """Writes the tolerance of each run of a study that measured its own."""
    with (HERE / "results" / "tolerances.csv").open("w") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("study", "arm", "seed", "floor", "tolerance"))
        for file in sorted(runs.glob(f"*/*/s*/{calibrate.FILE}")):
            found = json.loads(file.read_text())
            study, arm, seed = file.parts[-4:-1]
            table.writerow((study, arm, seed[1:], found["floor"], found["tolerance"]))


if __name__ == "__main__":
    (HERE / "results").mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        collect(pathlib.Path(sys.argv[1]))
    PAGE.write_text(tables.fill(PAGE.read_text(), tables.every(HERE / "results")))
    plots.write(HERE / "results", HERE / "plots")
