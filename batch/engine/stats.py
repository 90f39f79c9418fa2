"""What an engine did so far, for summaries and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batch.engine.blocks import BlockManager
from batch.engine.image_features import FeatureCache
from batch.engine.sequence import Piece, Sequence


@dataclass(frozen=True)
class StepSeconds:
    """What the host spent on a step: building it, the model (on a device: launching it), drawing its tokens."""

    build_s: float
    model_s: float
    sample_s: float

    def and_sampling(self, seconds: float) -> StepSeconds:
        return replace(self, sample_s=self.sample_s + seconds)


@dataclass
class EngineStats:
    """Times in seconds; `peak_image_bytes` counts image features that sequences hold between steps.

    `prompt_tokens` counts the prompt of every completion that was started, n of them for n choices;
    `cached_prompt_tokens` those of them whose keys and values were there already. `image_encodings_saved`: pictures
    that were not encoded, `cached_prompt_images` of them because they lie in such a beginning, the others because
    their features were still there. Of `run_s`, the whole of a backend's `run`, the engine did nothing for
    `input_wait_s`, in which it asked for requests, and `output_wait_s`, in which results were written.
    `weights_read_bytes` and `weights_wait_s` (that computing waited): of streamed weights, since they were opened.
    """

    steps: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_prompt_images: int = 0
    image_encodings: int = 0
    image_encodings_saved: int = 0
    peak_full_blocks: int = 0
    peak_chunked_blocks: int = 0
    peak_image_bytes: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    model_s: float = 0.0
    sample_s: float = 0.0
    run_s: float = 0.0
    input_wait_s: float = 0.0
    output_wait_s: float = 0.0
    weights_read_bytes: int = 0
    weights_wait_s: float = 0.0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of the prompt tokens that were there already."""
        return self.cached_prompt_tokens / max(self.prompt_tokens, 1)

    def count_start(self, sequence: Sequence) -> None:
        """A sequence was admitted. One that is resumed after a preemption has been counted before."""
        if sequence.is_resumed:
            return
        sequence.num_cached_at_start = sequence.num_cached
        self.prompt_tokens += sequence.prompt_len
        self.cached_prompt_tokens += sequence.num_cached
        if sequence.images is not None:
            self.cached_prompt_images += sequence.images.num_before(sequence.num_cached)

    def count_step(self, plan: list[Piece], took: StepSeconds) -> None:
        """A step was computed."""
        self.steps += 1
        self.computed_tokens += sum(piece.length for piece in plan)
        self.output_tokens += sum(piece.wants_logits for piece in plan)
        held_bytes = sum(piece.sequence.images.num_bytes for piece in plan if piece.sequence.images is not None)
        self.peak_image_bytes = max(self.peak_image_bytes, held_bytes)
        self.build_s += took.build_s
        self.model_s += took.model_s
        self.sample_s += took.sample_s

    def count_memory(self, blocks: BlockManager, features: FeatureCache) -> None:
        """Before the step is booked: what it holds, and what became of its pictures."""
        self.peak_full_blocks = max(self.peak_full_blocks, blocks.full.num_used)
        self.peak_chunked_blocks = max(self.peak_chunked_blocks, blocks.chunked.num_used)
        self.image_encodings = features.num_encoded
        self.image_encodings_saved = self.cached_prompt_images + features.num_saved
