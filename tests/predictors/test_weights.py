"""Checksums that tell one model's weights from another's."""

import torch
from support.models import make_model, with_lora

from lemo_hf.eval.weights import weights_checksum


def test_a_checksum_of_weights():
    model = make_model("llama")
    first = weights_checksum(model)
    assert first == weights_checksum(make_model("llama")) and len(first) == 16
    assert first != weights_checksum(model.to(torch.bfloat16))
    model = make_model("llama")
    model.lm_head.weight.data[3, 4] = torch.nextafter(
        model.lm_head.weight.data[3, 4], torch.tensor(9.0)
    )
    assert first != weights_checksum(model)
    adapted = with_lora(make_model("llama"))
    before = weights_checksum(adapted)
    next(p for name, p in adapted.named_parameters() if "lora_B" in name).data += 1
    assert before != weights_checksum(adapted)
