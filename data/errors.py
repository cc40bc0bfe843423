"""The one error of this package."""


class DataError(ValueError):
    """A data set that cannot be used as asked: says what, got, allowed and what to do."""
