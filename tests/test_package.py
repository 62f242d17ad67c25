"""The distributions: what is in them, what they require, and one version in all places."""

import email
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import dcmdp_jax

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = sorted(path.name for path in ROOT.glob("requirements*.txt"))
BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])('out'))"
)


def build(kind, folder):
    """Returns the distribution that setuptools makes of a folder, as an index would get it."""
    run = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder / "out" / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files, in which what is built does not disturb the tree."""
    copied = tmp_path_factory.mktemp("package") / "checkout"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    for folder in ("dcmdp_jax", "tests", "experiments"):
        shutil.copytree(ROOT / folder, copied / folder, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith(".git"):
            shutil.copy(path, copied)
    for folder in ("runs", "models"):  # of a checkout in use
        (copied / folder).mkdir()
        (copied / folder / "model.safetensors").write_bytes(b"")
    return copied


@pytest.fixture(scope="module")
def sdist(checkout):
    return build("sdist", checkout)


@pytest.fixture(scope="module")
def wheel(checkout):
    with zipfile.ZipFile(build("wheel", checkout)) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def modules(names):
    return {name for name in names if name.startswith("dcmdp_jax/")}


@pytest.mark.full
def test_the_wheel_has_the_package_with_its_types_and_nothing_else(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dcmdp_jax").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert modules(wheel.namelist()) == files
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "dcmdp_jax",
        f"dcmdp_jax-{dcmdp_jax.__version__}.dist-info",
    }


@pytest.mark.full
def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    with zipfile.ZipFile(build("wheel", folder)) as rebuilt:
        assert sorted(rebuilt.namelist()) == sorted(wheel.namelist())


@pytest.mark.full
def test_the_source_distribution_has_what_the_build_reads_and_no_run_or_model(sdist):
    with tarfile.open(sdist) as archive:
        top = {member.name.split("/")[1] for member in archive if "/" in member.name}
    assert top == {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "dcmdp_jax",
        "dcmdp_jax.egg-info",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
    }


@pytest.mark.full
def test_without_extras_the_core_is_required_alone(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w.-]+", line)[0] for line in core}
    assert names == {"jax", "flax", "optax", "numpy", "safetensors"}


@pytest.mark.full
def test_no_extra_asks_for_tensorflow(metadata):
    names = {re.match(r"[\w.-]+", line)[0] for line in metadata.get_all("Requires-Dist")}
    assert not names & {"tensorflow", "seqio", "google-jetstream"}  # the last requires the others


@pytest.mark.full
def test_the_wheel_has_the_version_of_the_package(metadata):
    assert metadata["Version"] == dcmdp_jax.__version__


def test_the_changelog_begins_with_the_version_of_the_package():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == dcmdp_jax.__version__


def test_the_citation_has_the_version_of_the_package():
    cited = re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited == [dcmdp_jax.__version__]


def names(lines):
    """The projects that requirements name, as an index spells them."""
    found = (re.match(r"[\w.-]+", line)[0] for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


@pytest.mark.full
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_training_asks_for_and_jetstream(lock, metadata):
    asked = [
        line
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line or re.search('extra == "(train|server|answers)"', line)
    ]
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    assert names(asked) | {"google-jetstream"} <= names(line for line in lines if line[0] != "#")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_all_that_it_has(lock):
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    assert [line for line in lines if line[0] != "#" and not re.fullmatch(r"\S+==\S+", line)] == []


def test_the_workflow_tests_every_python_of_the_package_with_a_lock():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))
    tested = workflow["jobs"]["first-tier"]["strategy"]["matrix"]["include"]
    stated = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text("utf-8"))
    assert [entry["python"] for entry in tested] == stated
    assert {entry["lock"] for entry in tested} <= set(LOCKS)
