"""The error of programs that cannot be typed."""


class ShardingError(ValueError):
    """A program or layout that the type engine refuses; the message names places, numbers and the
    fix.

    Not a TypeError: Python swallows that inside `__add__` and tries the reflected operation.
    """


class StrayValueError(ShardingError):
    """A segment uses a value of another one that did not come in the carry.

    Args:
        message: what is wrong.
        maker: the segment that made the value.
    """

    def __init__(self, message: str, maker: str) -> None:
        super().__init__(message)
        self.maker = maker
