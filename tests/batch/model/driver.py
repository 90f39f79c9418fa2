"""Feeds a Model step by step with hand-made block tables: what an engine does, reduced to what the model tests need."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers

from batch.model.inputs import PagedKind, StepInput
from batch.model.model import load_model
from converters.detect import open_checkpoint


def ours(folder, dtype=torch.float32):
    return load_model(open_checkpoint(folder), "cpu", dtype)


def theirs(folder, dtype=torch.float32, attention="eager"):
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@dataclass
class Row:
    """One sequence: all its tokens so far, how many are in the cache, its blocks of both kinds."""

    tokens: list[int]
    features: dict[int, torch.Tensor] = field(default_factory=dict)  # position → image feature [H]
    done: int = 0
    full: list[int] = field(default_factory=list)
    chunked: list[int] = field(default_factory=list)
    chunk: int = 0


class Driver:
    """Sequences on one model. Blocks are handed out in a scattered order, dead chunks are given back."""

    def __init__(self, model, num_blocks=256, block_size=8):
        self.model, self.block_size = model, block_size
        self.kv = model.allocate_kv(num_blocks, num_blocks, block_size)
        shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.free = {"full": list(shuffled), "chunked": list(reversed(shuffled))}
        self.chunk_size = model.arch.text.attention_chunk_size

    def step(self, work, all_logits=False):
        """work: list of (row, count): the next `count` tokens of each row. Returns [float32 logits] per row."""
        tokens, positions, starts, context, rows, features = [], [], [0], [], [], []
        slots = {"full": [], "chunked": []}
        kv_start = {"full": [], "chunked": []}
        for row, count in work:
            begin, end = row.done, row.done + count
            assert begin // self.chunk_size == (end - 1) // self.chunk_size, "a step must not cross a chunk"
            if begin // self.chunk_size != row.chunk:
                self.free["chunked"] += row.chunked
                row.chunked, row.chunk = [], begin // self.chunk_size
            for kind, first in (("full", 0), ("chunked", row.chunk * self.chunk_size)):
                blocks = getattr(row, kind)
                while len(blocks) * self.block_size < end - first:
                    blocks.append(self.free[kind].pop())
                kv_start[kind].append(first)
                for position in range(begin - first, end - first):
                    block, offset = divmod(position, self.block_size)
                    slots[kind].append(blocks[block] * self.block_size + offset)
            for position in range(begin, end):
                if position in row.features:
                    rows.append(len(tokens))
                    features.append(row.features[position])
                tokens.append(row.tokens[position])
                positions.append(position)
            row.done = end
            starts.append(len(tokens))
            context.append(end)
        wanted = list(range(len(tokens))) if all_logits else [s - 1 for s in starts[1:]]
        step = StepInput(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor(context, dtype=torch.int32),
            full=self._kind(work, "full", kv_start, slots),
            chunked=self._kind(work, "chunked", kv_start, slots),
            logits_rows=torch.tensor(wanted),
            max_query_len=max(count for _, count in work),
            max_context_len=max(context),
            image_rows=torch.tensor(rows) if rows else None,
            image_features=torch.stack(features) if rows else None,
        )
        logits = self.model.forward(step.to(self.model.device), self.kv)
        sizes = [count for _, count in work] if all_logits else [1] * len(work)
        return list(logits.split(sizes))

    def _kind(self, work, kind, kv_start, slots):
        tables = [getattr(row, kind) for row, _ in work]
        table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
        for index, blocks in enumerate(tables):
            table[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return PagedKind(table, torch.tensor(kv_start[kind], dtype=torch.int32), torch.tensor(slots[kind]))

    def pieces(self, row, piece):
        """Sizes that cut the rest of a row into pieces of at most `piece`, none across an attention chunk."""
        position, total = row.done, len(row.tokens)
        while position < total:
            count = min(piece, total - position, self.chunk_size - position % self.chunk_size)
            yield count
            position += count

    def logits(self, row, piece=10**9):
        """All logits [tokens, V] of one row, fed alone in pieces."""
        return torch.cat([self.step([(row, count)], all_logits=True)[0] for count in list(self.pieces(row, piece))])
