"""Predictors on the Hub: the real client against a server on this machine that speaks as the Hub.

The client reads its settings when it is imported, so it runs in processes of its own: one online,
one with HF_HUB_OFFLINE=1, which share a cache.
"""

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from support.hub_client import (
    BASE,
    auto,
    failing,
    load,
    load_snapshot,
    load_while_it_is_pushed,
    made,
    push,
    push_large,
    recommended,
    train_and_push,
)
from support.hub_server import TOKEN, Hub
from support.trainers import losses, make_trainer

from lemo_hf import LeMoConfig
from lemo_hf.storage.files import CONFIG_NAME, WEIGHTS_NAME


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def processes(hub, tmp_path_factory):
    """Functions that call a function in the online and in the offline process."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    context = multiprocessing.get_context("spawn")
    pools = []
    for offline in ("0", "1"):
        pool = ProcessPoolExecutor(1, mp_context=context)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**settings, "HF_HUB_OFFLINE": offline}.items():
                patch.setenv(name, value)
            pool.submit(made)  # starts the process, with these settings
        pools.append(pool)
    yield [partial(_call, pool) for pool in pools]
    for pool in pools:
        pool.shutdown()


def _call(pool, function, *args, **options):
    return pool.submit(function, *args, **options).result()


@pytest.fixture
def online(processes):
    return processes[0]


@pytest.fixture
def offline(processes):
    return processes[1]


@pytest.mark.oldest
def test_push_and_load(online, hub):
    url = online(push, "me/first", private=True, commit_message="hello")
    assert url.startswith(hub.url) and hub.repositories["me/first"].private
    assert sorted(hub.files("me/first")) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert json.loads(hub.files("me/first")[CONFIG_NAME])["predictor"]["block_size"] == 8
    assert b'LeMoConfig(predictor="me/first"' in hub.files("me/first")["README.md"]
    assert online(load, "me/first") == made()
    before = len(hub.requests)
    assert online(load, "me/first") == made()
    downloads = [path for method, path, _ in hub.requests[before:] if method == "GET"]
    assert downloads == []  # the cache had both files


def test_a_second_push_takes_the_place_of_the_first(online, hub):
    online(push, "me/twice")
    first = hub.repositories["me/twice"].branches["main"]
    assert online(load, "me/twice") == made()
    online(push, "me/twice", seed=1)
    assert online(load, "me/twice") == made(1)
    assert online(load, "me/twice", revision=first) == made()
    assert first != hub.repositories["me/twice"].branches["main"]


def test_revisions(online, hub):
    online(push, "me/branches")
    online(push, "me/branches", seed=2, revision="large")
    assert online(load, "me/branches", revision="large") == made(2)
    assert online(load, "me/branches") == made()
    kind, text = online(failing, load, "me/branches", revision="nowhere")
    assert kind is OSError and "has no branch, tag or commit 'nowhere'" in text


def test_both_files_come_from_one_commit(online, hub, tmp_path):
    online(push, "me/race")
    assert online(load_while_it_is_pushed, "me/race", tmp_path) == made()
    assert online(load, "me/race") == made(1)


def test_a_snapshot_is_a_directory_like_any_other(online, tmp_path):
    online(push, "me/snapshot")
    assert online(load_snapshot, "me/snapshot", tmp_path) == made()


@pytest.mark.oldest
def test_the_config_of_a_repository(online, hub):
    online(push, "me/config", revision="v1")
    config = online(recommended, "me/config", revision="v1")
    expected = LeMoConfig(predictor="me/config", predictor_revision="v1", block_size=8)
    assert config == dataclasses.replace(expected, dense_first_layers=1)  # it has none for layer 0
    kind, text = online(failing, recommended, "me/config")
    assert kind is ValueError and f"'me/config' has no {CONFIG_NAME}" in text


def test_what_is_missing(online, hub):
    kind, text = online(failing, load, "me/missing")
    assert kind is OSError and "'me/missing' is not a directory, and the Hub shows no" in text
    hub.repositories["me/empty"].commit("main", {"lemo_predictors.bin": b"pickle"})
    kind, text = online(failing, load, "me/empty")
    assert kind is ValueError and f"'me/empty' has no {CONFIG_NAME}" in text
    online(push, "me/half")
    hub.repositories["me/half"].commits[hub.repositories["me/half"].branches["main"]].pop(
        WEIGHTS_NAME
    )
    kind, text = online(failing, load, "me/half")
    assert kind is ValueError and f"has no {WEIGHTS_NAME}" in text and "never loaded" in text
    kind, text = online(failing, load, "not/a/repository")
    assert kind is OSError and "neither a directory nor a repository id" in text


def test_private_repositories_need_a_token(online, tmp_path):
    online(push, "me/secret", private=True)
    for token in (False, "hf_wrong"):
        kind, text = online(failing, load, "me/secret", token=token, cache_dir=tmp_path)
        assert kind is OSError and "private or gated, log in" in text
    assert online(load, "me/secret", token=TOKEN, cache_dir=tmp_path) == made()


def test_a_cut_download_is_resumed(online, hub, tmp_path):
    expected = online(push_large, "me/cut")
    assert len(hub.files("me/cut")[WEIGHTS_NAME]) * 7 // 8 > DOWNLOAD_CHUNK_SIZE
    hub.faults[WEIGHTS_NAME] = ["cut"]
    assert online(load, "me/cut", cache_dir=tmp_path) == expected
    ranges = [r for _, path, r in hub.requests if path.startswith("/me/cut/") and r]
    assert ranges == [f"bytes={DOWNLOAD_CHUNK_SIZE}-"] and hub.faults[WEIGHTS_NAME] == []


def test_an_error_midway_is_clear_and_the_next_try_works(online, hub, tmp_path):
    online(push, "me/broken")
    hub.faults[WEIGHTS_NAME] = ["cut", 500]
    kind, text = online(failing, load, "me/broken", cache_dir=tmp_path)
    assert kind is OSError and f"{WEIGHTS_NAME} of 'me/broken'" in text and "Try again" in text
    assert not list(Path(tmp_path).rglob(f"snapshots/*/{WEIGHTS_NAME}"))
    assert online(load, "me/broken", cache_dir=tmp_path) == made()


def test_a_corrupted_download_is_refused(online, hub, tmp_path):
    online(push, "me/flipped")
    hub.faults[WEIGHTS_NAME] = ["flip"]
    kind, text = online(failing, load, "me/flipped", cache_dir=tmp_path)
    assert kind is ValueError and "it is damaged" in text and "force_download=True" in text
    assert online(load, "me/flipped", cache_dir=tmp_path, force_download=True) == made()


def test_offline_the_cache_is_all_there_is(online, offline, hub):
    online(push, "me/cached")
    online(push, "me/uncached")
    assert online(load, "me/cached") == made()
    before = len(hub.requests)
    assert offline(load, "me/cached") == made()
    kind, text = offline(failing, load, "me/uncached")
    assert kind is OSError
    assert f"{CONFIG_NAME} of 'me/uncached' is not in the Hub's cache" in text
    assert len(hub.requests) == before


@pytest.mark.oldest
def test_auto_takes_the_most_downloaded_that_belongs_to_the_weights(online, offline, hub):
    base = dataclasses.replace(BASE, name="org/base", fingerprint="f" * 64)
    kind, text = online(failing, auto, base)
    assert kind is ValueError and "no predictor for the weights of 'org/base'. Set" in text
    others = dataclasses.replace(base, fingerprint="e" * 64)
    larger = dataclasses.replace(base, num_attention_heads=8)
    for downloads, (repo, made_for) in enumerate(
        {"me/few": base, "me/most": base, "me/others": others, "me/larger": larger}.items()
    ):
        online(push, repo, base=made_for)
        hub.repositories[repo].downloads = downloads
    online(push, "me/elsewhere", base=dataclasses.replace(base, name="org/other"))
    online(push, "me/hidden", base=base, private=True)
    repo, logged = online(auto, base)
    assert repo == "me/most" and logged[1:] == ("me/most", "org/base")
    assert online(auto, others)[0] == "me/others"
    # A cut-up model's weights cannot be read: what fits its shapes is taken.
    assert online(auto, dataclasses.replace(base, fingerprint=None))[0] == "me/others"
    kind, text = online(failing, auto, dataclasses.replace(base, fingerprint="0" * 64))
    assert kind is ValueError and "me/most: made for other weights" in text
    assert "me/larger: made for another architecture" in text and "policy='overlap'" in text
    kind, text = offline(failing, auto, base)
    assert kind is OSError and "could not ask the Hub" in text and "Set predictor to a" in text


def test_training_with_a_predictor_of_the_hub(online, hub, tmp_path):
    online(push, "me/teacher", seed=4)
    logged = online(train_and_push, tmp_path / "out", "me/teacher", "me/tuned")
    assert len(logged) == 4 and torch.tensor(logged).isfinite().all()
    files = hub.files("me/tuned")
    assert {"adapter_model.safetensors", "README.md", CONFIG_NAME, WEIGHTS_NAME} <= set(files)
    assert "## Training with LeMo" in files["README.md"].decode()
    assert f"checkpoint-2/{WEIGHTS_NAME}" in files
    assert not any(name.endswith(".part") for name in files)
    assert len(hub.repositories["me/tuned"].commits) > 3  # while training, too
    assert online(load, "me/tuned") == made(4)
    assert online(recommended, "me/tuned").predictor == "me/tuned"
    # This process is offline, and has never seen a hub.
    config = LeMoConfig(predictor="me/teacher", block_size=8, dense_first_layers=1)
    resumed = make_trainer(tmp_path / "again", config)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert losses(resumed, resume_from_checkpoint=checkpoint) == logged
