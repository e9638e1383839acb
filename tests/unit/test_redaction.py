"""Secrets in texts: what looks like one, or is the value of a variable named like one, is not shown."""

from __future__ import annotations

import json
import os

import pytest

from distmerge.errors import InputError
from distmerge.redaction import is_secret, redacted, redacted_json

TOKEN = "hf_" + "aB3dE6gH9" * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"no such folder: {TOKEN}/x", "no such folder: ***/x"),
        (f"https://user:{TOKEN}@huggingface.co/a/b", "https://***@huggingface.co/a/b"),
        ("https://user:pa55@host/a and s3://key:word@bucket", "https://***@host/a and s3://***@bucket"),
        ("https:/user:pa55@host/a", "https:/***@host/a"),
        ("https://oauth2@host/a", "https://***@host/a"),
        ("https://me:with@sign@host/a@b", "https://***@host/a@b"),
        ("Authorization: Bearer abc.def-ghi_jkl", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic ***'}"),
        ("curl -H 'authorization: token 123abc'", "curl -H 'authorization: token ***'"),
        ("sent bearer abcdefghijk twice", "sent bearer *** twice"),
        ("https://x/y?a=1&access_token=abc&b=2", "https://x/y?a=1&access_token=***&b=2"),
        ("https://s3/x?X-Amz-Signature=abc&X-Amz-Date=5", "https://s3/x?X-Amz-Signature=***&X-Amz-Date=***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3-8B",
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "hf_transfer and hf_xet",
        "/data/hf_Llama31Instruct8Bmerged/token-test/authorization/my_key=4",
        "model.layers.0.self_attn.q_proj.weight: has shape (4, 8)",
        "/data/bases/llama@main/model.safetensors",
        "hint: --map 'REGEX=>REPLACEMENT'",
        "https://huggingface.co/meta-llama/Llama-3-8B/resolve/main/a.safetensors?download=true",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_the_value_of_a_variable_that_is_named_like_a_secret_is_hidden_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-of-a-known-shape")
    monkeypatch.setenv("WANDB_API_KEY", "not-of-a-known-shape-but-longer")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.cache/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    text = "/x/not-of-a-known-shape-but-longer/not-of-a-known-shape/short/home/me/.cache/token/certainly"
    assert redacted(text) == "/x/***/***/short/home/me/.cache/token/certainly"
    assert [is_secret(name) for name in ("AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN", "PATH")] == [
        True,
        True,
        False,
    ]
    error = InputError(f"a {TOKEN}", where="in not-of-a-known-shape", hint=f"see https://u:{TOKEN}@h/")
    assert str(error) == "in ***: a ***\nhint: see https://***@h/"


def test_a_word_is_hidden_as_a_word_alone_and_the_name_of_a_folder_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "adapters")
    monkeypatch.setenv("MAX_TOKENS", "10000000")
    monkeypatch.setenv("BORG_PASSPHRASE", "two words")
    monkeypatch.setenv("OPENAI_KEY", "sk-1234567")
    monkeypatch.setenv("SECRETS_HOME", "/data/jobs")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    text = "myadapters adapters_2 adapters, 100000000 10000000, xtwo wordsx, sk-12345678"
    assert redacted(text) == "myadapters adapters_2 ***, 100000000 ***, x***x, ***8"
    assert redacted(folders := "/data/jobs/7 /run/credentials/x") == folders


def test_a_status_of_many_ranks_asks_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("distmerge.redaction.is_secret", asked.append)
    redacted_json({"ranks": [{"nbytes": 5, "doing": "a.safetensors"}] * 100})
    assert sorted(asked) == sorted(os.environ)


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", 'with "quotes" in it')
    value = {"error": ['Authorization: a\\"b', 'with "quotes" in it', 5, None, 1.5], "x": {TOKEN: (True,)}}
    found = json.loads(redacted_json(value))
    assert found == {"error": ['Authorization: ***"b', "***", 5, None, 1.5], "x": {"***": [True]}}
