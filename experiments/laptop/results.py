"""What do the studies add up to? Makes every table and picture of RESULTS.md anew, after copying
what the runs left, if named.

Command:  python experiments/laptop/results.py [runs/laptop]
Hardware: any; needs matplotlib (pip install 'dcmdp-jax[report]')
Time:     1.3 s
Result:   RESULTS.md and its 4 pictures in experiments/laptop/plots
"""

import pathlib
import shutil
import sys

import plots
import tables

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "RESULTS.md"


def collect(runs):
    """Copies what the studies and probes under `runs` left: STUDY/table.csv as STUDY.csv, and the
    probes' own tables.
    """
    for table in sorted(runs.glob("*/table.csv")):
        shutil.copyfile(table, HERE / "results" / f"{table.parent.name}.csv")
    for table in sorted(runs.glob("*.csv")):
        shutil.copyfile(table, HERE / "results" / table.name)


if __name__ == "__main__":
    (HERE / "results").mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        collect(pathlib.Path(sys.argv[1]))
    PAGE.write_text(tables.fill(PAGE.read_text(), tables.every(HERE / "results")))
    plots.write(HERE / "results", HERE / "plots")
