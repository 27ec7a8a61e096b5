"""`torch.compile`: training passes run as without it, all others are compiled."""

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import compile_regions
from support.models import batch, loss_and_gradients, make_model, with_lora
from support.processes import launch
from support.trainers import SPARSE, adapter, losses, make_trainer
from support.training_cases import assert_same, read
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from lemo_hf import apply_lemo, remove_lemo

# Traces as the default does, and then runs the graph as it is.
QUICK = "eager"
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    """Accelerate keeps the flag for the process; Dynamo, what it has compiled."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    forget()
    yield
    forget()


def forget():
    AcceleratorState._reset_state()
    torch._dynamo.reset()
    counters.clear()


class Frames(TrainerCallback):
    """How many functions Dynamo has looked at, after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, *args, **kwargs):
        self.seen.append(counters["frames"]["total"])


def train(folder, compiled, **arguments):
    forget()
    frames = Frames()
    backend = {"torch_compile": True, "torch_compile_backend": QUICK} if compiled else {}
    trainer = make_trainer(folder, SPARSE, callbacks=[frames], **backend, **arguments)
    return trainer, losses(trainer), frames.seen


def make(lora):
    torch.manual_seed(0)
    model = make_model("llama", "sdpa", num_hidden_layers=2)
    return with_lora(model) if lora else model


def captured():
    """Operations that are in compiled graphs."""
    return counters["stats"]["calls_captured"]


@pytest.mark.parametrize(
    ("lora", "arguments"),
    [(False, {}), (True, {}), (True, CHECKPOINTED), (False, {"bf16": True})],
)
def test_the_flag_changes_no_number(tmp_path, lora, arguments):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    arguments = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 2, **arguments}
    plain, expected, _ = train(tmp_path, False, model=make(lora), **arguments)
    trainer, found, frames = train(tmp_path, True, model=make(lora), **arguments)
    assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert found == expected
    for log, other in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert log.get("eval_loss") == other.get("eval_loss")
        assert log.get("lemo/attention_retention") == other.get("lemo/attention_retention")
    for name, weight in adapter(trainer).items():
        torch.testing.assert_close(weight, adapter(plain)[name], rtol=0, atol=0, msg=name)
    # All that is traced is the way to the model, in the first step; nothing of it computes.
    assert frames[0] > 0 and len(set(frames)) == 1 and captured() == 0


def test_a_compiled_run_resumes(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole, expected, _ = train(tmp_path / "whole", True, **saves)
    forget()
    again = make_trainer(tmp_path / "again", SPARSE, torch_compile_backend=QUICK)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "lemo_config.json").is_file()
    assert losses(again, resume_from_checkpoint=str(checkpoint)) == expected
    for name, weight in adapter(again).items():
        torch.testing.assert_close(weight, adapter(whole)[name], rtol=0, atol=0, msg=name)


def test_evaluation_by_itself_is_compiled(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    found = []
    for backend in ({}, {"torch_compile_backend": QUICK}):
        forget()
        trainer = make_trainer(
            tmp_path, SPARSE, model=make(lora=True), eval_dataset=rows, **backend
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-6) and captured() > 100


def compile_and_apply(model, order):
    """``model`` compiled, with LeMo on it; what to call."""
    if order == "before":
        compiled = torch.compile(model, backend=QUICK)
        apply_lemo(compiled, SPARSE)
        return compiled
    if order == "in place, before":
        model.compile(backend=QUICK)
    apply_lemo(model, SPARSE)
    if order == "in place, after":
        model.compile(backend=QUICK)
    if order == "after":
        return torch.compile(model, backend=QUICK)
    if order == "layer by layer":
        return compile_regions(model, backend=QUICK)
    return model


@pytest.mark.parametrize(
    ("order", "lora"),
    [
        pytest.param("after", False, marks=pytest.mark.soak),
        ("after", True),
        pytest.param("before", False, marks=pytest.mark.soak),
        ("in place, after", False),
        ("in place, before", False),
        ("layer by layer", True),
    ],
)
def test_any_order_and_way_of_compiling(order, lora):
    plain, model = make(lora), make(lora)
    apply_lemo(plain, SPARSE)
    compiled = compile_and_apply(model, order)
    # Layer by layer, embeddings and the last norm are compiled in training as well.
    whole = order != "layer by layer"
    exact = {"rtol": 0, "atol": 0} if whole else {}
    seen = []
    for tokens in (70, 64, 70, 80, 56):
        inputs = batch(tokens=tokens)
        expected, gradients = loss_and_gradients(plain, **inputs)
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(expected), **exact)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, gradients[name], msg=name, **exact)
        model.zero_grad()
        seen.append(counters["frames"]["total"])
    # A second length makes lengths dynamic, once.
    assert len(set(seen[1:])) == 1
    trained = captured()
    assert not (whole and trained)
    compiled.eval(), plain.eval()
    with torch.no_grad():
        found, expected = (m(**batch(), use_cache=False).loss for m in (compiled, plain))
    torch.testing.assert_close(found, expected)
    assert captured() > trained + 100


def test_what_is_compiled_without_lemo_is_compiled_after_it():
    model = make(lora=False)
    expected, _ = loss_and_gradients(model, **batch())
    apply_lemo(model, SPARSE)
    compiled = torch.compile(model, backend=QUICK)
    compiled(**batch()).loss.backward()
    assert captured() == 0
    remove_lemo(compiled)
    assert "_call_impl" not in vars(model)
    assert compiled(**batch()).loss.item() == pytest.approx(expected, rel=1e-6)
    assert captured() > 100


def test_an_evaluation_pass_is_one_graph():
    """Hooks and layers of LeMo break no graph, as generation with a static cache may ask."""
    model = make(lora=False).eval()
    with torch.no_grad():
        expected = model(**batch(), use_cache=False).loss
        apply_lemo(model, SPARSE)
        whole = torch.compile(model.__call__, backend=QUICK, fullgraph=True)
        torch.testing.assert_close(whole(**batch(), use_cache=False).loss, expected)


@pytest.mark.soak
def test_by_inductor(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    found = []
    for flag in (False, True):
        forget()
        model = make_model("llama", "sdpa", num_hidden_layers=1)
        trainer = make_trainer(
            tmp_path, SPARSE, model=model, eval_dataset=rows, torch_compile=flag, max_steps=2
        )
        found.append([trainer.evaluate()["eval_loss"], *losses(trainer)])
    assert captured() > 100
    assert found[1] == pytest.approx(found[0], rel=1e-5)


TWO = """
import os
from pathlib import Path
from support.training_cases import make_trainer, outcome, write
folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
lemo = {"policy": "pooled", "agree_across_layers": False, "retention": 0.4}
fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
small = {"lora": False, "lemo": lemo, "model_options": {"num_hidden_layers": 2}, "max_steps": 2}
for engine, settings in (("ddp", {}), ("fsdp", fsdp)):
    for name, flag in (("plain", {}), ("compiled", {"torch_compile_backend": "eager"})):
        trainer = make_trainer(folder / engine / name, **small, **settings, **flag)
        trainer.train()
        assert (type(trainer.model_wrapped).__name__.endswith("OptimizedModule")) == bool(flag)
        losses, weights = outcome(trainer)
        weights = {key.replace("_orig_mod.", ""): weight for key, weight in weights.items()}
        write(folder, f"{engine}-{name}", (losses, weights), process)
"""


@pytest.mark.soak
def test_ddp_and_fsdp(tmp_path):
    launch(TWO, tmp_path, processes=(2,))
    for engine in ("ddp", "fsdp"):
        assert_same(read(tmp_path, f"{engine}-compiled"), read(tmp_path, f"{engine}-plain"))


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_by_inductor_on_the_gpu(tmp_path, lora):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    settings = {"use_cpu": False, "bf16": True, "eval_dataset": rows, **CHECKPOINTED}
    found = []
    for flag in (False, True):
        forget()
        model = make(lora).cuda()
        trainer = make_trainer(tmp_path, SPARSE, model=model, torch_compile=flag, **settings)
        found.append([trainer.evaluate()["eval_loss"], *losses(trainer)])
    assert captured() > 100
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.gpu
def test_generation_with_a_static_cache_on_the_gpu():
    """Then transformers compiles the call of the model by itself, with CUDA graphs."""
    model = make(lora=False).cuda().eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = batch()["input_ids"].cuda()
    expected = model.generate(prompt, **options)
    apply_lemo(model, SPARSE)
    found = model.generate(prompt, cache_implementation="static", **options)
    assert captured() > 100
    assert torch.equal(found, expected)
