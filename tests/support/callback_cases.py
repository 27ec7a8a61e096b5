"""Trainers of transformers' own, with `LeMoCallback`."""

from transformers import Trainer

from lemo_hf.integrations.callback import LeMoCallback
from support.trainers import make_trainer
from support.training_cases import InOrder


def with_callback(tmp_path, config, **arguments):
    callbacks = [LeMoCallback(config)]
    return make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks, **arguments)


class WithCallback(InOrder):
    """`InOrder` whose LeMo comes by the callback, before the model is prepared or after that."""

    late = False

    def __init__(self, lemo_config, **kwargs):
        callback = LeMoCallback(lemo_config)
        super().__init__(callbacks=[] if self.late else [callback], lemo_config=None, **kwargs)
        if self.late:
            self.add_callback(callback)


CASES = {
    f"{what}-{name}": {"lora": what == "lora", "lemo": {"agree_across_layers": False}, **case}
    for name, case in {"whole": {}, "padded": {"data": "padded"}}.items()
    for what in ("lora", "full")
}
