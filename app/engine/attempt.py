"""Work on the device that may fail without taking the engine with it."""

from collections.abc import Callable

from models.device import out_of_memory


def attempt(work: Callable[[], object]) -> Exception | None:
    """Do it, or return what it raised. The traceback's frames, which hold tensors, are let go of."""
    try:
        work()
    except Exception as error:
        if not out_of_memory(error):
            return error
        return error.with_traceback(None)
    return None
