"""The errors of the library: one tree, each naming the field of the request that is at fault and why."""

CUT_CHARACTERS = 200


def cut(text: str, most: int = CUT_CHARACTERS) -> str:
    """What somebody else wrote, short enough for an error or a log: at most `most` characters, and how many more."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more)"


class SlipstreamError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelLoadError(SlipstreamError):
    """A model, adapter or plan file cannot be served: unknown layout, unsafe file, wrong shape."""


class RequestError(SlipstreamError, ValueError):
    """A well-formed request that is not possible. `field` names what to change, `reason` says why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class OutOfRange(RequestError):
    """A value outside the range that this model allows."""


class WrongBackbone(RequestError):
    """An accelerator, scheduler or input that this model's family does not have."""


class AcceleratorConflict(RequestError):
    """Two accelerators that claim the same part of a step."""


class GuidanceRequired(RequestError):
    """Sharing attention across guidance (ASC) in a run that has no unconditional rows."""


class StudentConflict(RequestError):
    """A guidance scale or a negative prompt that a distilled student has baked in differently."""


class UnknownAdapter(RequestError):
    """A LoRA that the model does not have, or whose file is gone."""


class PlanMismatch(RequestError):
    """A DiTFastAttn plan that was searched for another model, scheduler, step count or size."""


class NoProfile(RequestError):
    """What only a profile can say, in a run that no profile of the model was measured for."""


class NonFiniteLatents(SlipstreamError):
    """The denoising of one trajectory ended in NaN or infinity."""


class MixedConditioning(SlipstreamError):
    """Rows of one forward of which only some are conditioned on something."""
