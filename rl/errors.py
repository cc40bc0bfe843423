"""Errors a user can act on: each says what is wrong, what was got, what is allowed and what to do. The CLI prints one and exits 2."""


class EntrlError(Exception):
    """Base of every error that is the user's to mend; also the matching built-in error."""


class ConfigError(EntrlError, ValueError):
    """A configuration value that cannot work."""


class MissingError(ConfigError):
    """A value that nobody gave; ``key`` is where it belongs."""

    def __init__(self, key: str):
        super().__init__(f"{key} is not set. Give it on the command line: {key}=...")
        self.key = key


class RunExistsError(EntrlError, FileExistsError):
    """A run name that is taken."""


class CheckpointError(EntrlError, FileNotFoundError):
    """A folder that is not a model, a checkpoint or a run."""


class SeamError(EntrlError, ImportError):
    """An installed TRL that entrl's seam was not tested against."""


class ServerError(EntrlError, RuntimeError):
    """A vLLM server that does not start or does not stay."""


def user_errors() -> tuple[type[Exception], ...]:
    """Every error that is the user's to mend, those of the other packages included."""
    from data.errors import DataError
    from rewards.errors import RewardError

    return EntrlError, DataError, RewardError
