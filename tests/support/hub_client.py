"""Small random predictors, and what the Hub tests do with them in processes of their own.

Such a process imports this file and, until it trains, nothing of transformers.
"""

from unittest import mock

import huggingface_hub
import torch

from lemo_hf import LeMoConfig, LeMoPredictor
from lemo_hf.predictors import on_hub
from lemo_hf.predictors.base_model import BaseModel
from lemo_hf.predictors.block_predictor import BlockPredictor
from lemo_hf.predictors.predictor_set import PredictorInfo
from lemo_hf.storage.files import WEIGHTS_NAME

# The facts of `make_model("llama")`.
BASE = BaseModel("llama", 32, 4, 4, 2, 97)


def sizes(rank):
    """Of a small `BlockPredictor`."""
    return {"hidden_size": BASE.hidden_size, "block_size": 8, "rank": rank}


def make_predictor(dense=(), seed=0, **info):
    """Random predictors of different sizes, one a layer but those in ``dense``."""
    facts = {"block_size": 8, "base": BASE, **info}
    torch.manual_seed(seed)
    layers = [None if i in dense else BlockPredictor(**sizes(5 + i)) for i in range(4)]
    predictor = LeMoPredictor(PredictorInfo(**facts), layers)
    for parameter in predictor.parameters():  # so large that seeds choose different blocks
        parameter.data.normal_()
    for network in filter(None, predictor.layers):
        network.scale.data.fill_(16)
    return predictor


def fingerprint(predictor):
    """A number a tensor, by which processes compare."""
    return [float(tensor.double().sum()) for tensor in predictor.state_dict().values()]


def made(seed=0):
    return fingerprint(make_predictor(dense=[0], seed=seed))


def push(repo, seed=0, base=BASE, **options):
    return make_predictor(dense=[0], seed=seed, base=base).push_to_hub(repo, **options)


def push_large(repo):
    """More than the client writes at a time, which is what it can resume from."""
    predictor = make_predictor(dense=[0])
    predictor.networks[1] = BlockPredictor(**sizes(50_000))
    predictor.push_to_hub(repo)
    return fingerprint(predictor)


def load(repo, **options):
    return fingerprint(LeMoPredictor.from_pretrained(repo, **options))


def load_while_it_is_pushed(repo, cache):
    """Someone pushes between the downloads of the two files."""
    original = huggingface_hub.hf_hub_download

    def download(repo_id, name, **options):
        if name == WEIGHTS_NAME:
            push(repo_id, seed=1)
        return original(repo_id, name, **options)

    huggingface_hub.hf_hub_download = download
    try:
        return load(repo, cache_dir=cache)
    finally:
        huggingface_hub.hf_hub_download = original


def load_snapshot(repo, directory):
    return load(huggingface_hub.snapshot_download(repo, cache_dir=directory))


def auto(base):
    """What the Hub has for a base model, and what was logged."""
    with mock.patch.object(on_hub.logger, "info") as log:
        repo = on_hub.find_predictor(base, block_size=8)
    return repo, log.call_args.args


def recommended(repo, **options):
    return LeMoConfig.from_pretrained(repo, **options)


def failing(call, *args, **options):
    """What went wrong: the class and the text."""
    try:
        call(*args, **options)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing went wrong")


def train_and_push(directory, source, target):
    """Train with a predictor of the Hub, pushing each checkpoint and the result."""
    from support.trainers import losses, make_trainer

    trainer = make_trainer(
        directory,
        LeMoConfig(predictor=source, block_size=8, dense_first_layers=1),
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id=target,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    logged = losses(trainer)
    trainer.push_to_hub()
    return logged
