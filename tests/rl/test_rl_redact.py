import pytest

from rl.redact import public_words, without_secrets


def test_secrets_are_left_out_at_any_depth_and_token_counts_are_not():
    config = {"a": {"api_key": "x", "max_new_tokens": 3, "hub_token": "y"}, "password": "z", "tokenizer": "t"}
    assert without_secrets(config) == {"a": {"max_new_tokens": 3}, "tokenizer": "t"}


@pytest.mark.parametrize(
    "key", ["token_secret", "tokenizer_password", "access_key", "PRIVATE_KEY", "passwd", "credentials", "authtoken"]
)
def test_a_secret_is_left_out_whatever_else_its_name_says(key):
    assert without_secrets({key: "x", "a": [{key: "x", "b": 1}]}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("key", ["answer_key", "max_tokens", "token_level", "tokenizer_name"])
def test_what_is_no_secret_stays(key):
    """The run folder's config.yaml goes the same way and is read back."""
    assert without_secrets({key: 1}) == {key: 1}


def test_words_of_a_command_line():
    words = ["train", "trainer.hub_token=hf_x", "a.api_key=", "trainer.max_tokens=3", "--config-dir", "plugin=[steer]"]
    shown = [
        "train",
        "trainer.hub_token=***",
        "a.api_key=***",
        "trainer.max_tokens=3",
        "--config-dir",
        "plugin=[steer]",
    ]
    assert public_words(words) == shown
