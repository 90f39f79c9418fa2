"""Conversations as the demo model sees them: tokens, tiles, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batch.chat import ChatFormat
from batch.images import TileSpec, make_tiles
from batch.tokenizer import Tokenizer
from examples.demo_model.questions import Cells, Conversation
from l4tool.core.arch import Arch
from l4tool.core.prompt import CHAT_TEMPLATE


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it: ids, which of them are to be foretold, and tiles uint8 [N, 3, S, S]."""

    ids: list[int]
    answer: list[bool]
    tiles: list[np.ndarray]
    seen: tuple[Cells, ...]


class Encoder:
    """Conversations → tokens and tiles, in the form of the checkpoint's chat template (tests compare the two), which
    knows no answers."""

    def __init__(self, tokenizer: Tokenizer, arch: Arch) -> None:
        assert arch.vision is not None
        self.tokenizer, self.spec = tokenizer, TileSpec(arch.vision.image_size)
        self.id = tokenizer.control_tokens
        self.chat = ChatFormat(tokenizer, CHAT_TEMPLATE, arch.vision.tokens_per_tile)

    def encode(self, made: Conversation) -> Encoded:
        ids, answer = [self.id["<|begin_of_text|>"]], [False]

        def add(tokens: Sequence[int], is_answer: bool = False) -> None:
            ids.extend(tokens)
            answer.extend([is_answer] * len(tokens))

        def header(role: str) -> None:
            add([self.id["<|header_start|>"], *self.tokenizer.encode(role), self.id["<|header_end|>"]])
            add(self.tokenizer.encode("\n\n"))

        eot = self.id["<|eot|>"]
        if made.system is not None:
            header("system")
            add([*self.tokenizer.encode(made.system), eot])
        tiles = []
        for number, (question, right) in enumerate(made.turns):
            header("user")
            for picture in made.pictures if number == 0 else ():
                cut = make_tiles(picture, self.spec)
                tiles.append(cut.pixels)
                add(self.chat.image_ids(cut.grid))
            add([*self.tokenizer.encode(question), eot])
            header("assistant")
            add([*self.tokenizer.encode(right), eot], is_answer=True)
        return Encoded(ids, answer, tiles, made.seen)


@dataclass(frozen=True)
class Batch:
    """Padded to the longest: tokens int64 [B, T], real bool [B, T], wanted bool [B, T] (the next token is an answer's),
    targets int64 [wanted], owner int64 [wanted], tiles uint8 [N, 3, S, S] or None, what is seen in them."""

    tokens: torch.Tensor
    real: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    tiles: torch.Tensor | None
    seen: list[Cells]


def collate(made: Sequence[Encoded], pad: int) -> Batch:
    longest = max(len(e.ids) for e in made) - 1
    tokens = torch.full((len(made), longest + 1), pad)
    answer, real = torch.zeros(tokens.shape, dtype=torch.bool), torch.zeros(tokens.shape, dtype=torch.bool)
    for row, e in enumerate(made):
        tokens[row, : len(e.ids)] = torch.tensor(e.ids)
        answer[row, : len(e.ids)] = torch.tensor(e.answer)
        real[row, : len(e.ids)] = True
    wanted = answer[:, 1:]
    tiles = [pixels for e in made for pixels in e.tiles]
    return Batch(
        tokens[:, :-1], real[:, :-1], wanted, tokens[:, 1:][wanted], wanted.nonzero()[:, 0],
        torch.from_numpy(np.concatenate(tiles)) if tiles else None, [cells for e in made for cells in e.seen],
    )  # fmt: skip
