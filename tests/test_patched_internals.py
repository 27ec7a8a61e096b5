"""docs/patched-internals.md is whole, and what it names of other packages is still there."""

import ast
import re

import pytest
import torch
from peft.tuners.lora.layer import Linear
from support.models import EAGER, batch, make_model, with_lora
from support.paths import ROOT
from transformers import AutoConfig, masking_utils

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core.families import FAMILIES
from lemo_hf.graphs.cuda_graphs import _no_documents
from lemo_hf.kernels.launch import untouched
from lemo_hf.memory.recompute import _ATTENTION

pytestmark = pytest.mark.oldest

PAGE = (ROOT / "docs" / "patched-internals.md").read_text(encoding="utf-8")
TEST = re.compile(r"\[test_\w+\.py\]\(\.\./(tests/[\w/]+\.py)\)((?:,? `test_\w+`)+)")
# Private names that are LeMo's own, or of what no Trainer run depends on: a tracker's, a token's.
OWN = {
    "_available",
    "_lemo_logits",
    "_lemo_setup",
    "_lock",
    "_original",
    "_removed",
    "_replaced",
    "_runtime",
    "_token",
}
# Eager attention never becomes a CUDA graph.
BY_SDPA = [family for family in FAMILIES if family not in EAGER]


def test_each_row_names_tests_that_exist():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    for row in rows:
        if row.startswith("| what |"):
            continue
        found = TEST.findall(row)
        assert found, row
        for path, names in found:
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in text, f"{path} has no {name}"


def test_private_names_of_other_packages_are_listed():
    read, own = set(), set(OWN)
    for path in [p for folder in ("lemo_hf", "kernels", "predictors") for p in code(folder)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                to_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                (own if to_self and isinstance(node.ctx, ast.Store) else read).add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.update({node.value} if node.value.isidentifier() else ())
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                assert not any(name.startswith("unittest") for name in names), path
    foreign = {x for x in read - own if re.fullmatch(r"_[a-z]\w*", x)}
    assert len(foreign) > 10
    assert not sorted(name for name in foreign if f"`{name}`" not in PAGE)


def code(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_reads_what_is_replaced(family, monkeypatch):
    """The rotary function by name, projections from ``self``: else both would run as they are."""
    model = with_lora(make_model(family, "sdpa"))
    row = FAMILIES[family]
    layers = model.get_base_model().get_submodule(row.layers)
    attentions = [getattr(layer, row.attention) for layer in layers if row.of_layer(layer) is row]
    inside = {id(m): n for attention in attentions for n, m in attention.named_modules()}
    called = []
    forward = Linear.forward
    monkeypatch.setattr(
        Linear,
        "forward",
        lambda self, x: (called.append(inside.get(id(self))), forward(self, x))[1],
    )
    rotated = []
    rotary = "lemo_hf.core.attention_call.rotary"
    monkeypatch.setattr(rotary, lambda q, k, *tables: rotated.append(q.shape[2]) or (q, k))
    apply_lemo(model, LeMoConfig(retention=0.5, block_size=8, policy="recent"))
    model(**batch(1, 64))
    # GPT-2's and Falcon's linears are classes of their own. Latent attention hands one on.
    if family not in ("gpt2", "falcon", "youtu", "deepseek_v3", "glm4_moe_lite"):
        assert not [name for name in called if name]
    every_other = family in ("smollm3", "exaone4")
    turns = row.half_rotary and any(
        name.endswith(("rotary_emb", "pos_emb")) for name, _ in model.named_modules()
    )
    assert rotated == [32] * (turns * len(attentions) // (2 if every_other else 1))


def test_a_module_looks_its_call_up_on_itself():
    module = torch.nn.Linear(1, 1)
    module._call_impl = lambda x: "own"
    assert module(torch.ones(1)) == "own"
    module._compiled_call_impl = lambda x: "compiled"
    assert module(torch.ones(1)) == "compiled"
    assert torch.nn.Linear._call_impl(module, torch.zeros(1)).shape == (1,)


@pytest.mark.parametrize("family", BY_SDPA)
def test_no_mask_asks_the_batch(family):
    """On the meta device nobody can ask; OPT no longer does, and the others do where they may."""
    model = make_model(family, "sdpa").to("meta", torch.bfloat16)  # experts' products ask for it
    model.config.pad_token_id = None  # GPT-2 looks for it, though never while a graph is recorded
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    if family not in ("opt", "falcon", "granitemoehybrid"):
        with pytest.raises(RuntimeError, match="meta tensors"):
            model(input_ids=ids, use_cache=False)
    before = dict(vars(masking_utils))
    with _no_documents():
        assert model(input_ids=ids, use_cache=False).logits.shape[:2] == (1, 32)
    assert vars(masking_utils) == before


@pytest.mark.parametrize(
    "kind",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
)
def test_every_kind_of_hook_is_seen(kind):
    module = torch.nn.Linear(1, 1)
    assert untouched(module)
    handle = getattr(module, f"register_{kind}")(lambda *_: None)
    assert not untouched(module)
    handle.remove()
    assert untouched(module)


def test_attention_operators_have_these_names():
    query = torch.randn(1, 2, 8, 4)
    with torch.profiler.profile() as profile:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    called = {event.name for event in profile.events()}
    assert called & set(_ATTENTION) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    for name in _ATTENTION:
        space, operator = name.split("::")
        assert space == "flash_attn" or hasattr(getattr(torch.ops, space), operator), name


def test_a_config_knows_where_it_is_from(tmp_path):
    make_model("llama").config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._name_or_path == str(tmp_path)
