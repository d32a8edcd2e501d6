"""What a model was trained to predict: markers in a single file, a scheduler's config in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdformats.configs import EPSILON, Schedule, V
from sdformats.keymap import EXTRAS
from sdformats.tensor import DType
from sdformats.views import Constant
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.configs import Config
    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
MARKERS = (V_MARKER, ZERO_SNR_MARKER)
"""Empty tensors of these names tell it in single files."""
_FLOWS = ("sd3", "flux")
"""Families that are trained to follow a flow, and predict nothing else."""
_UNMARKED = ("sd2",)
"""Families whose single files have no markers: who reads them tries the model out, or asks."""
_MODELSPEC = {"v": V, V: V, EPSILON: EPSILON}
_V_ARCHITECTURE = "stable-diffusion-v2-768-v"


def schedule_of(seen: Detection, source: TensorSource, scheduler: Config, asked: str | None) -> Schedule:
    """Return what a model in a single file predicts: as asked, else as its markers, its configs or its texts say.

    Args:
        seen: what it is.
        source: the file.
        scheduler: the config of its scheduler that it came with; empty where there is none.
        asked: ``epsilon`` or ``v_prediction``, where the user says so.

    Raises:
        RequestError: nothing tells, and the family's models differ.
    """
    if seen.family in _FLOWS:
        if asked is not None:
            raise RequestError(f"{source.path}: {seen.family} models predict a flow, and --prediction is not for them")
        return Schedule()
    there = {marker for marker in MARKERS if marker in source.specs or f"{EXTRAS}.{marker}" in source.specs}
    told = asked or (V if V_MARKER in there else scheduler.get("prediction_type")) or _told(source.metadata)
    if told is None and seen.family == "sd2":
        if seen.variant == "base":
            raise RequestError(
                f"{source.path}: SD2 models predict the noise (those of 512 pixels) or v (those of 768), and nothing in "
                "this one tells; say --prediction epsilon or --prediction v_prediction"
            )
        told = EPSILON  # inpainting and depth were only trained so
    return Schedule(told if isinstance(told, str) else None, ZERO_SNR_MARKER in there)


def _told(metadata: Mapping[str, str]) -> str | None:
    if metadata.get("modelspec.architecture") == _V_ARCHITECTURE:
        return V
    return _MODELSPEC.get(metadata.get("modelspec.prediction_type", ""))


def marked(tensors: Mapping[str, Ref], family: str, scheduler: Config) -> dict[str, Ref]:
    """Return a single file's tensors with the markers that a folder's scheduler asks for, and no others.

    Args:
        tensors: by name.
        family: what the model is; SD2 has no markers.
        scheduler: the config; empty where there is none: then markers stay as they are.
    """
    if not scheduler or family in _FLOWS or family in _UNMARKED:
        return dict(tensors)
    wanted = {
        V_MARKER: scheduler.get("prediction_type") == V,
        ZERO_SNR_MARKER: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    found = {name: ref for name, ref in tensors.items() if wanted.get(name, True)}
    new = {name: Constant((), DType.F32, (0,)) for name in MARKERS if wanted[name] and name not in found}
    return found | new
