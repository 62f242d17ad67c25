"""The golden files: vectors of our own, made at import, and those that are there besides.

These lie in ../shared/golden beside the checkout, or are named by DCMDP_GOLDEN. A file that states
no thresholds has those of `THRESHOLDS`.
"""

import json
import os
import pathlib

import pytest

from support import losses_vectors

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "golden"
THRESHOLDS = {
    "w_tis_token": 2.0,
    "w_tis_token_batchnorm": 2.0,
    "w_tis_seq": 2.0,
    "w_icepop": [0.5, 5.0],
    "w_clip_token": [0.5, 2.0],
    "keep_mis_token": [0.5, 2.0],
    "keep_mis_seq": [0.7, 1.43],
    "keep_geo_seq": [0.95, 1.05],
    "keep_veto": 1e-4,
    "keep_trm_max_k3": 0.05,
    "keep_seq_mean_k3": 0.02,
    "keep_token_k3": 0.05,
    "keep_kpop": 0.02,
    "keep_m2po": 0.02,
    "keep_opsm": 0.5,
    "keep_ipo_absprob": 0.1,
    "dppo_tv": 0.2,
    "dppo_kl": 0.05,
}


def _named() -> dict[str, dict]:
    paths = sorted(SHARED.glob("*.json"))
    if os.environ.get("DCMDP_GOLDEN"):
        paths.append(pathlib.Path(os.environ["DCMDP_GOLDEN"]))
    return {path.stem: json.loads(path.read_text()) for path in paths}


GIVEN = _named()
FILES = {"float64": losses_vectors.vectors()} | GIVEN
CASES = [(name, case) for name, file in FILES.items() for case in file["cases"]]

every_file = pytest.mark.parametrize("file", FILES.values(), ids=list(FILES))
every_case = pytest.mark.parametrize(
    "name, case", CASES, ids=[f"{name}-{case}" for name, case in CASES]
)


def thresholds(name: str) -> dict:
    return THRESHOLDS | FILES[name].get("thresholds", {})
