"""Which sequences can never run, whatever memory there is."""

from __future__ import annotations

from batch.engine.image_features import ImageMismatch, SequenceImages
from batch.engine.sequence import Sequence
from batch.requests import ImageTiles
from l4tool.core.arch import Arch


def refusal(sequence: Sequence, images: tuple[ImageTiles, ...], arch: Arch) -> tuple[str, str] | None:
    """Why this one cannot (code, message), or None. Attaches its images."""
    text, vision = arch.text, arch.vision
    prompt, context = sequence.tokens, text.max_position_embeddings
    if not prompt:
        return "empty_prompt", "the prompt has no tokens"
    if len(prompt) >= context:
        return "context_length_exceeded", f"the prompt has {len(prompt)} tokens; the model's context is {context}"
    if min(prompt) < 0 or max(prompt) >= text.vocab_size:
        return "invalid_token", f"token ids must lie in 0 … {text.vocab_size - 1}"
    if images and (vision is None or arch.image_token_id is None):
        return "images_not_supported", "this checkpoint has no vision tower, so it cannot read images"
    if vision is not None and arch.image_token_id is not None:
        try:
            seen = SequenceImages(prompt, images, arch.image_token_id, vision.tokens_per_tile)
        except ImageMismatch as error:
            return "image_mismatch", str(error)
        sequence.images = seen if images else None
    return None
