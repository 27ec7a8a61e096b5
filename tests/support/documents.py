"""Documents, and their perplexity by a model in fp64."""

from functools import cache

import torch

from lemo_hf.eval.perplexity import perplexity
from support.models import make_model


def documents(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


DOCUMENTS = documents(29, 12, 1, 5, 30, 13, 2)


def run(model, texts=DOCUMENTS, **settings):
    return perplexity(model, texts, **{"max_length": 12, "progress": False, **settings})


@cache
def double_model():
    """All of its arithmetic is fp64; Llama's norms and rotary embedding are fp32 whatever it is."""
    return make_model("opt", "sdpa").double().eval()
