"""The error that a user can mend, and errors as one line. Imports nothing."""


class ConfigError(ValueError):
    """Something the user can mend: the message is one line that names the key and the fix. The CLI exits with 2."""


def one_line(error: BaseException) -> str:
    """What went wrong, with the error's type unless it is a plain ValueError that says enough by itself."""
    text = " ".join(str(error).split())[:300]
    return text if text and type(error) in (ValueError, ConfigError) else f"{type(error).__name__}: {text}"
