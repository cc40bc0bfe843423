"""What of a configuration and a command line may be written down and sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SECRET_WORDS = ("api_key", "apikey", "access_key", "private_key", "password", "passwd", "secret", "credential")


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without keys named like a credential, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_secrets(value)
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in config.items() if not _secret(str(key))}


def public_words(words: Sequence[str]) -> list[str]:
    """A command line with ``***`` for the value of every ``key=value`` whose key is named like a credential."""

    def public(word: str) -> str:
        key, equals, _ = word.partition("=")
        return f"{key}=***" if equals and _secret(key) else word

    return [public(word) for word in words]


def _secret(key: str) -> bool:
    key = key.lower()
    # hub_token is a secret, max_completion_tokens, tokenizer and token_level are not
    return any(word in key for word in _SECRET_WORDS) or key.endswith("token")
