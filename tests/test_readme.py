"""The README: short, with an example that runs and links that lead somewhere."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_it_has_the_two_commands_that_ci_runs():
    assert len(re.findall(r"```bash\n", README)) == 2


def test_the_python_example_gives_a_finite_loss():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    use = """
import numpy as np
logp = np.log(np.random.default_rng(0).uniform(0.1, 0.9, (3, 128, 5))).astype("float32")
reward = (np.arange(128) % 3 == 0).astype("float32")
group = np.arange(128) // 2
mask = np.ones((128, 5), bool)
loss = jax.jit(loss_fn)(*logp, reward, group, mask, state)
moved = dual.update(state, *constraint.measure(logp[1], logp[2], mask), 0.0037)
assert np.isfinite(loss) and moved.multiplier > state.multiplier
"""
    subprocess.run([sys.executable, "-c", example + use], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_the_walk_names_files_of_the_package():
    walk = README.split("## The walk")[1].split("## More")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", walk)
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / "dcmdp_jax" / name).exists()]
