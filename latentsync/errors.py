"""`UserError`, the one exception whose message a user is meant to read, and recognizing errors of memory."""


class UserError(Exception):
    """A problem that the user can solve: one sentence that names the file or setting and the remedy.

    The command line prints it and exits with code 2; the page shows it. It is never shown with a traceback.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, the device's or the processor's."""
    from torch import OutOfMemoryError

    words = "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory", "CUDA error: out of memory"
    return isinstance(error, (OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)
