"""A config that is wrong says what may have been meant."""

import inspect
import pickle
import re

import pytest
from support.models import make_model
from transformers import TrainingArguments

from lemo_hf import LeMoConfig, LeMoTrainer, apply_lemo
from lemo_hf.integrations.callback import LeMoCallback


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"retention": 50}, "got 50 in retention=50: did you mean 0.5?"),
        ({"retention": "50%"}, "got '50%' in retention='50%': did you mean 0.5?"),
        ({"retention": "0.3"}, "got '0.3' in retention='0.3': did you mean 0.3?"),
        ({"retention": [1, 30]}, "got 30 in retention=(1, 30): did you mean 0.3?"),
        ({"retention": "half"}, "got 'half' in retention='half'."),
        ({"retention": 0}, "got 0 in retention=0."),
        ({"retention": 5000}, "got 5000 in retention=5000."),
        ({"threshold": "1.5"}, "got '1.5' in threshold='1.5': did you mean 1.5?"),
        ({"threshold": -2}, "got -2 in threshold=-2."),
        ({"dense_finish": 10}, "got 10: did you mean 0.1?"),
        ({"finish_retention": "60"}, "got '60': did you mean 0.6?"),
        ({"random_share": 25}, "got 25: did you mean 0.25?"),
        ({"block_size": "64"}, "got '64': did you mean 64?"),
        ({"offload_gib": "16"}, "got '16': did you mean 16?"),
        ({"seed": "3"}, "got '3': did you mean 3?"),
        ({"policy": "overlaps"}, "got 'overlaps'; did you mean 'overlap'?"),
        ({"supervise": "keep"}, "got 'keep'; did you mean 'kept'?"),
        ({"recompute": "selectiv"}, "got 'selectiv'; did you mean 'selective'?"),
    ],
)
def test_values(values, ends):
    with pytest.raises(ValueError, match=re.escape(ends) + "$"):
        LeMoConfig(**values)


def test_keys():
    with pytest.raises(ValueError, match="LeMoConfig: retenton; did you mean 'retention'?"):
        LeMoConfig.from_dict({"retenton": 0.5})


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        ({"retention": 0.5}, "write LeMoConfig(**values), or LeMoConfig.from_dict(values)."),
        ("thresholds", "write LeMoConfig.from_pretrained('thresholds')."),
        (0.5, "give LeMoConfig(...)."),
    ],
)
def test_no_config(config, way_out, tmp_path):
    model = make_model("llama")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for use in (
        lambda: LeMoTrainer(model=model, args=args, lemo_config=config),
        lambda: LeMoCallback(config),
        lambda: apply_lemo(model, config),
    ):
        with pytest.raises(ValueError, match="lemo_config must be") as error:
            use()
        assert str(error.value).endswith(way_out)


def test_a_field_that_there_is_none_of():
    with pytest.raises(
        TypeError, match=r"LeMoConfig has no 'retenton'; did you mean 'retention'\?"
    ):
        LeMoConfig(retenton=0.3)
    with pytest.raises(TypeError, match=r"has no 'xyzzy'\.$"):
        LeMoConfig(xyzzy=1)
    assert list(inspect.signature(LeMoConfig).parameters)[:2] == ["retention", "threshold"]
    assert pickle.loads(pickle.dumps(LeMoConfig(0.4))) == LeMoConfig(retention=0.4)
