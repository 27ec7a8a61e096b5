"""docs/support.md and the refusals name every causal LM of transformers: supported, or why not."""

import re

import pytest
from support.models import make_model
from support.paths import ROOT
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core.families import FAMILIES, MULTIMODAL, family_of
from lemo_hf.core.unsupported import WHY_NOT, why_not

PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.oldest
REASONS = {name: reason for reason, types in WHY_NOT.items() for name in types.split()}


def section(title):
    return re.split(r"^##+ ", PAGE.split(f"## {title}\n")[1], flags=re.M)[0]


def rows(title):
    """The types that each row of a section's table names in its last column but one."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: re.findall(r"`([\w-]+)`", second) for first, second, *_ in cells}


def supported(name):
    """Whether a model that AutoModelForCausalLM makes of this type has a row."""
    return name in (*FAMILIES, *MULTIMODAL) or CONFIG_MAPPING[name].model_type in FAMILIES


def test_no_causal_lm_is_forgotten():
    """A type of a newer transformers needs a row in families.py, or a reason in unsupported.py."""
    for name in CAUSAL:
        assert supported(name) != (name in REASONS), name
    assert len(REASONS) == sum(len(types.split()) for types in WHY_NOT.values())
    assert not REASONS.keys() & {*FAMILIES, *MULTIMODAL}


def test_the_page_names_every_type():
    found = [name for types in rows("Models").values() for name in types]
    assert sorted(found) == sorted({*FAMILIES, *MULTIMODAL, "gpt-sw3"})
    assert rows("Models that are refused") == {
        reason: types.split() for reason, types in WHY_NOT.items()
    }


def test_the_page_counts_the_most_used():
    text = section("How far this reaches")
    ((used, told),) = re.findall(r"^(`.+`\.)\n\n.*?\*\*(\d+) of 40\*\*", text, flags=re.M | re.S)
    names = re.findall(r"`([\w-]+)`", used)
    assert len(set(names)) == len(names) == 40
    known = {*FAMILIES, *MULTIMODAL}
    assert set(names) <= known | REASONS.keys()
    assert int(told) == sum(name in known for name in names)


@pytest.mark.parametrize("reason", WHY_NOT)
def test_the_refusal_says_why(reason):
    for name in WHY_NOT[reason].split():
        assert why_not(name) == reason
    present = [name for name in WHY_NOT[reason].split() if name in CONFIG_MAPPING]
    with pytest.raises(ValueError) as error:
        family_of(AutoConfig.for_model(present[0]))
    assert f"model_type {present[0]!r} is not supported: {reason}. Supported: llama" in str(
        error.value
    )


def test_a_type_that_nobody_knows():
    model = make_model("llama")
    model.config.model_type = "brand_new"
    with pytest.raises(ValueError, match=r"'brand_new' is not supported: .* no row for it.*add"):
        apply_lemo(model, LeMoConfig(block_size=8))
