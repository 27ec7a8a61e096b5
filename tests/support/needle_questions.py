"""Questions about needles in text."""

import torch

from lemo_hf.eval.needles import (
    NeedleRow,
)


@torch.no_grad()
def questions(model, rows=7):
    """Rows of two lengths that the model answers in full, in part and not at all."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(rows):
        length, count = (40, 23)[number % 2], 2 + number % 3
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        row = NeedleRow(ids, count, number % 2 / 2, 0, "key", "value")
        for place in range(-count, 0):  # greedily, by full passes
            logits = model(torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
            logits[:3] = -torch.inf  # no special token
            ids[place] = int(logits.argmax())
        if number % 3 == 1:
            ids[-1] = 3 + (ids[-1] + 1) % 90
        if number % 3 == 2:
            ids[-count] = 3 + (ids[-count] + 1) % 90
        made.append(row)
    return made
