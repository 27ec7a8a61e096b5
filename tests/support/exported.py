"""What several processes saved, used by one."""

import shutil

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.models import make_model
from support.paths import ROOT

SCALING = 2.0  # of `with_lora`: lora_alpha / r
PREFIX = "base_model.model."


def assert_merges(lemo, adapter, trained, folder):
    """PEFT and ``lemo merge`` put the adapter at ``adapter`` into the base model.

    Args:
        lemo: Runs the command line.
        adapter: What ``save_model`` wrote.
        trained: The adapter's weights when training ended, by the names of the PEFT model.
        folder: To write to.
    """
    base = make_model("llama")
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name, first in trained.items():
        module, is_first, _ = name.removeprefix(PREFIX).partition(".lora_A.")
        if is_first:
            second = trained[name.replace("lora_A", "lora_B")]
            expected[f"{module}.weight"] += SCALING * second @ first
    base.save_pretrained(folder / "base")
    for path in (ROOT / "examples" / "demo" / "model").glob("*token*"):
        shutil.copy(path, folder / "base")
    by_peft = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    code, _, err = lemo(
        *("merge", "--model", folder / "base", "--adapter", adapter),
        *("--output", folder / "merged"),
    )
    assert code == 0, err
    by_lemo = AutoModelForCausalLM.from_pretrained(folder / "merged")
    for merged in (by_peft, by_lemo):
        assert merged.state_dict().keys() == expected.keys()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], msg=lambda m, n=name: f"{n} {m}")
