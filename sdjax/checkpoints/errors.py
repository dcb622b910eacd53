"""What goes wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A file that cannot be used as a model; the message says what it is, what was expected and what to do."""
