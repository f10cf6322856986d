"""The exceptions that commands turn into a message and exit code 2."""


class UserError(Exception):
    """Bad configuration, data or files: the message names the place and the remedy."""


class UnusableDatasetError(UserError):
    """A dataset that can teach nothing. `data.skip_unusable` leaves it out instead."""
