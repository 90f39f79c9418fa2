"""Memory of a run whose weights come from disk layer by layer: what moves, what stays, what is left for the batch.

The parts that move are the layers and lm_head, the largest pieces of a checkpoint. Of the embedding only single rows
are read, and the vision tower is in memory only while pictures are encoded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from converters.names import EMBEDDING, LM_HEAD
from converters.read_ahead import AHEAD_BYTES
from converters.reader import Reader
from l4tool.core.arch import TextArch

SHARE = 0.85  # of the memory that is available; the rest is for what others take meanwhile
RESERVE_BYTES = 384 << 20  # compiled kernels, requests that wait, image features
PACKING_BYTES = 256 << 20  # of a layer's experts that are read before they are packed together
MAX_BATCH_TOKENS = 32768  # of one step: by then a layer takes far longer to compute with than to read
MAX_SEQS = 4096
SLICE_TOKENS = 4096  # tokens of a step that pass through a layer together: products are at full speed long before
STEP_SHARE = 0.25  # of what is left: activations of the whole step; the KV cache has the rest
LOGITS_SHARE = 0.125
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")
_VISION = ("vision_model.", "multi_modal_projector.")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes in memory: `parts` are the layers and then lm_head, `vision` the tower and projector, `total` everything.

    `largest_read` is the largest piece of the file, in bytes there, that is read at once.
    """

    parts: tuple[int, ...]
    vision: int
    total: int
    largest_read: int

    def moving(self, ahead: int) -> int:
        """The most that is in memory at a time with `ahead` (0 or 1) parts loaded ahead, buffers included."""
        following = [*self.parts[1:], self.parts[0]] if ahead else [0] * len(self.parts)
        pairs = max(a + b for a, b in zip(self.parts, following, strict=True))
        return pairs + AHEAD_BYTES + PACKING_BYTES + self.largest_read


@dataclass(frozen=True)
class Room:
    """How a streamed run divides its memory. `moving_bytes`: weights; `step_bytes`: activations and logits."""

    ahead: int
    moving_bytes: int
    step_bytes: int
    max_batch_tokens: int
    max_seqs: int
    kv_bytes: int


def weigh(reader: Reader, item_bytes: int) -> WeightBytes:
    """From headers alone. Unquantized weights take `item_bytes` an element in memory, quantized ones what they take
    in the file."""
    text = reader.arch.text
    layers = [0] * text.num_layers
    head = embedding = vision = largest = total = 0
    for name, info in reader.tensors().items():
        held = math.prod(info.shape) * item_bytes if info.dtype in _FLOATS else info.nbytes
        total += held
        layer = _LAYER.match(name)
        if layer is not None:
            layers[int(layer[1])] += held
        elif name == LM_HEAD:
            head += held
        elif name == EMBEDDING:
            embedding += held
        elif name.startswith(_VISION):
            vision += held
        if layer is not None or name == LM_HEAD:
            largest = max(largest, reader.extent(name).nbytes)
    if text.tie_word_embeddings:
        head, largest, total = embedding, max(largest, reader.extent(EMBEDDING).nbytes), total + embedding
    return WeightBytes((*layers, head), vision, total, largest)


def divide(
    text: TextArch, weights: WeightBytes, available_bytes: int, item_bytes: int,
    max_batch_tokens: int | None = None, max_seqs: int | None = None, kv_bytes: int | None = None,
) -> Room | None:  # fmt: skip
    """Divide the available memory; None where not even one layer at a time leaves room for a batch. What is given
    stays as it is. Loading ahead is given up where it would take most of the room for the batch."""
    rooms = [_left(text, weights, available_bytes, item_bytes, ahead) for ahead in (0, 1)]
    ahead = 1 if rooms[1] >= rooms[0] // 4 else 0
    left = rooms[ahead]
    if left <= 0:
        return None
    each_seq, each_token = _seq_bytes(text), _token_bytes(text, item_bytes)
    seqs = max_seqs or _between(1, int(left * LOGITS_SHARE) // each_seq, MAX_SEQS)
    tokens = max_batch_tokens or _between(max(seqs, 256), int(left * STEP_SHARE) // each_token, MAX_BATCH_TOKENS)
    seqs = min(seqs, tokens)
    step = _slice_bytes(text, min(tokens, SLICE_TOKENS), item_bytes) + tokens * each_token + seqs * each_seq
    kv = max(left - tokens * each_token - seqs * each_seq, 0) if kv_bytes is None else kv_bytes
    return Room(ahead, weights.moving(ahead), step, tokens, seqs, kv)


def needed_bytes(text: TextArch, weights: WeightBytes, item_bytes: int) -> int:
    """Available memory below which `divide` gives None."""
    return math.ceil((_fixed_bytes(text, weights, item_bytes, ahead=0) + 1) / SHARE)


def _left(text: TextArch, weights: WeightBytes, available_bytes: int, item_bytes: int, ahead: int) -> int:
    return int(available_bytes * SHARE) - _fixed_bytes(text, weights, item_bytes, ahead)


def _fixed_bytes(text: TextArch, weights: WeightBytes, item_bytes: int, ahead: int) -> int:
    """Weights, the reserve, and one slice's tensors or, before these are there, the vision tower."""
    slice_bytes = _slice_bytes(text, SLICE_TOKENS, item_bytes)
    return weights.moving(ahead) + RESERVE_BYTES + max(slice_bytes, weights.vision)


def _slice_bytes(text: TextArch, tokens: int, item_bytes: int) -> int:
    """Tensors of one layer over one slice: its input and output a few times, q, k, v, and two feed-forwards' inside."""
    inner = max(text.intermediate_size, text.intermediate_size_mlp if len(text.moe_layers) < text.num_layers else 0)
    heads = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    return tokens * item_bytes * (8 * text.hidden_size + heads + 4 * inner)


def _token_bytes(text: TextArch, item_bytes: int) -> int:
    """What a token of a step holds from layer to layer: the residual stream, what two feed-forwards add to it, the
    rotation (cos and sin in float32) and its ids."""
    return 3 * text.hidden_size * item_bytes + 4 * text.head_dim + 64


def _seq_bytes(text: TextArch) -> int:
    """Logits of one sequence in float32, three copies."""
    return 3 * 4 * text.vocab_size


def _between(least: int, wanted: int, most: int) -> int:
    return max(least, min(wanted, most))
