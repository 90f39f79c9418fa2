"""Meta's layout: params.json, tokenizer.model, and tensor-parallel consolidated.*.pth."""

from __future__ import annotations

import json

from converters.encoders import DTYPES, Plain
from converters.meta import PARAMS, TOKENIZER
from converters.meta_names import file_name, meta_rows
from converters.meta_params import params_from_arch
from converters.pth_io import plan_pth
from converters.reader import Reader
from converters.side_sources import tokenizer_model
from converters.targets import Options, Output, OutputFile, Piece
from converters.targets.hf import output_arch
from converters.writer import TensorSpec

RANKS = 8  # as published
# Hugging Face's files say what params.json and tokenizer.model say.
DROPPED = (
    "*.json", "*.jinja", "tokenizer.model",
)  # fmt: skip


def make(reader: Reader, options: Options) -> Output:
    """See `converters.targets.Target.make`."""
    dtype = DTYPES[options.dtype] if options.dtype else reader.dtype
    arch = output_arch(reader, options.text_only, dtype)
    files = []
    for rank, rows in enumerate(meta_rows(arch, options.shards or RANKS)):
        plan = plan_pth(file_name(rank), [TensorSpec(row.stored, row.shape, dtype) for row in rows])
        files.append(OutputFile(plan, [Piece(row, Plain(dtype)) for row in rows]))
    params = (json.dumps(params_from_arch(arch), indent=2) + "\n").encode()
    return Output(files, {PARAMS: params, TOKENIZER: tokenizer_model(reader)}, DROPPED, last=PARAMS)
