"""The one exception of the library."""


class DMVAEError(ValueError):
    """Bad input or a run gone wrong: the message says what was found, what was expected and what to do.

    Notebooks show the message alone; scripts get the usual traceback.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook: the message instead of the library's frames
        return [f"{type(self).__name__}: {self}"]
