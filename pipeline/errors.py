"""The errors this package raises on purpose; every message is one sentence that a user can act on."""


class PipelineError(Exception):
    """Base of every error that the command line shows as a sentence instead of a traceback."""


class InputError(PipelineError, ValueError):
    """Something a user gave is wrong: names the value, the place and what would be right (exit code 2)."""


class TooLittleMemoryError(InputError):
    """The devices cannot hold the network that they are to train."""


class RunError(PipelineError, RuntimeError):
    """A run failed after its input was accepted: a lost worker, a rank that raised, a timeout (exit code 1)."""


class LostDeviceError(RunError):
    """The worker of a device, or its machine, is gone."""


def first_line(error: BaseException) -> str:
    """What an error says, without the accounts that libraries add on further lines; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
