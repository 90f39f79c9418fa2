"""Meta's tokenizer.model as llama-models ships it, whole or cut off, and folders made from it."""

from dataclasses import replace
from pathlib import Path

from converters.arch_io import arch_from_config
from converters.hf_side_files import hf_side_files
from examples.make_checkpoint import full_config, text_config
from l4tool.core.prompt import special_ids

NUM_PUBLISHED = 200_000


def tokenizer_bytes(num_base=NUM_PUBLISHED):
    """The file's first `num_base` lines: the single bytes are the first, so this is a vocabulary of its own."""
    import llama_models

    data = (Path(llama_models.__file__).parent / "llama4/tokenizer.model").read_bytes()
    return data if num_base == NUM_PUBLISHED else b"".join(data.splitlines(keepends=True)[:num_base])


def scout_arch(num_base=NUM_PUBLISHED, text_only=False, padding=0):
    """A Scout-like architecture of the real widths for a vocabulary of `num_base` tokens and the special ones."""
    text = text_config("scout-width", "scout", 1, 2, num_base + len(special_ids(num_base)))
    arch = arch_from_config(full_config(text, "scout-width", text_only), "config.json")
    return replace(arch, text=replace(arch.text, vocab_size=arch.text.vocab_size + padding))


def write_folder(folder, num_base=NUM_PUBLISHED, text_only=False):
    for name, content in hf_side_files(scout_arch(num_base, text_only), tokenizer_bytes(num_base)).items():
        (folder / name).write_bytes(content)
    return folder
