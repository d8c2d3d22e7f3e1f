"""Every error that lrserve raises on purpose. A message says what is wrong, where, and the next step."""


class LrserveError(Exception):
    """Base of every deliberate error. The command line prints it as one line and exits with code 2."""


class InputError(LrserveError):
    """The model, the text or an option cannot be used as given."""


class UnsupportedModelError(InputError):
    """The architecture is not one that lrserve knows how to factorize, export and serve."""


class InfeasibleTargetError(LrserveError):
    """No rank plan meets the requested ratio, speedup or perplexity limit."""


class CalibrationError(LrserveError):
    """The activations or their covariances are unusable (not finite, or no token was seen)."""


class NotFiniteError(CalibrationError):
    """A number is infinite or none at all. Where a part of the model alone depends on it, that part is left as it was."""


class ArtifactError(LrserveError):
    """An exported folder is damaged, incomplete, of another format version, or may not be written."""


class EngineError(LrserveError):
    """The serving engine is missing, of an untested version, or failed; the message ends with its log's last lines."""


class AgreementError(LrserveError):
    """An exported rendering computes something else than the model in memory; the export is not published."""
