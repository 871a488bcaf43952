"""The error of programs that cannot be typed."""


class ShardingError(ValueError):
    """A program or layout that the type engine refuses; the message names places, numbers and the
    fix.

    Not a TypeError: Python swallows that inside `__add__` and tries the reflected operation.
    """
