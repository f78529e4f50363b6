"""The one exception that a user is meant to read, and the one kind of others that has its own sentence."""


class UserError(Exception):
    """What the user can put right: one sentence that names the file or setting and the remedy.

    The command line prints it and exits with code 2; the page shows it. It never carries a traceback.
    """


def short_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had, the device's or the processor's."""
    from torch import OutOfMemoryError

    words = "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory", "CUDA error: out of memory"
    return isinstance(error, (OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)
