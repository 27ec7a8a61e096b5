"""FSDP2 finds sparse layers by their class, shards them, and their passes stay the same."""

import pytest
import torch
import torch.distributed as dist
from support.models import batch, make_model, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lemo_hf import LeMoConfig, apply_lemo, remove_lemo
from lemo_hf.core import layer as layer_module

pytestmark = pytest.mark.oldest
EQUAL = {"cpu": 1e-6, "cuda": 1e-5}  # a GPU adds up in another order each time


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def mesh(tmp_path, request):
    meeting, kind = f"file://{tmp_path}/rendezvous", request.param
    backend = "gloo" if kind == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    yield init_device_mesh(kind, (1,))
    dist.destroy_process_group()


def rows(mesh, *shape):
    return {name: x.to(mesh.device_type) for name, x in batch(*shape).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fully_sharded_layers(mesh, checkpointing):
    config = LeMoConfig(
        block_size=8, policy="pooled", agree_across_layers=False, dense_first_layers=1
    )
    results = []
    for shard in (False, True):
        model = make_model("llama").to(mesh.device_type)
        apply_lemo(model, config)
        assert {type(layer).__name__ for layer in model.model.layers} == {"LlamaDecoderLayer"}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if shard:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        loss = model(**rows(mesh)).loss
        loss.backward()
        gradients = {
            name: getattr(parameter.grad, "_local_tensor", parameter.grad)
            for name, parameter in model.named_parameters()
        }
        results.append((loss.item(), gradients, model._lemo.report()))
    (loss, gradients, report), (sharded_loss, sharded, sharded_report) = results
    equal = EQUAL[mesh.device_type]
    assert sharded_loss == pytest.approx(loss, rel=equal) and sharded_report == report
    for name, gradient in gradients.items():
        assert relative_error(sharded[name], gradient) < equal, name


def test_layers_that_were_sharded_since_are_given_back(mesh):
    """As FSDP2 would have them without LeMo, and they may have LeMo again."""
    losses = []
    for removed in (False, True):
        model = make_model("llama").to(mesh.device_type)
        if removed:
            apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        remove_lemo(model)
        kinds = [[x.__name__ for x in type(layer).__mro__] for layer in model.model.layers]
        losses.append((model(**rows(mesh)).loss.item(), kinds))
    assert losses[0] == losses[1]
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
    assert model(**rows(mesh)).loss.item() != losses[0][0]


def test_the_stream_is_not_copied_between_layers(mesh, monkeypatch):
    model = make_model("llama").to(mesh.device_type)
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    copied, places = [], []
    open_stream = layer_module.open_stream
    monkeypatch.setattr(layer_module, "open_stream", lambda x: copied.append(x) or open_stream(x))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *hooked: places.append(hooked[-1].data_ptr()))
    model(**rows(mesh, 2, 64)).loss.backward()
    assert len(copied) <= 1  # the embeddings
    assert len(places) == len(model.model.layers) and len(set(places)) == 1


def test_rows_saved_under_sharding_are_kept_rows(mesh):
    model = make_model("llama").to(mesh.device_type)
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, recompute="full"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**rows(mesh, 2, 64)).loss.backward()
    assert shapes.count((2, 32, 32)) == 4
