"""Tokenizer, chat template and the small files of a Hugging Face folder ↔ GGUF metadata.

Keys and values are those of llama.cpp's converter (`conversion/base.py`, `get_vocab_base`; `gguf.SpecialVocab`). Our
own keys, `l4tool.file.NAME`, hold the small files as they were, for whoever reads the file back; llama.cpp ignores
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from converters.fields import parse_json
from converters.hf_side_files import small_files
from converters.reader import Reader
from converters.side_sources import side_file, side_object
from converters.tiktoken_bpe import bpe_json, merges_of
from l4tool.core.arch import Arch
from l4tool.core.byte_level import unspell
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import BOS, SPLIT

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types
PRE_TOKENIZER = "llama4"
SAME_PATTERN = (PRE_TOKENIZER, "gpt-4o")  # llama.cpp splits text for both in one way
FILE_KEY = "l4tool.file."
TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
TEMPLATE = "chat_template.jinja"
NAMED = ("bos", "eos", "pad")
ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
SAMPLING = {"temperature": "temp", "top_p": "top_p"}  # generation_config.json's word, GGUF's after `general.sampling.`


def tell_tokenizer(writer: Any, reader: Reader, arch: Arch) -> None:
    """Give `gguf.GGUFWriter` the source's tokenizer, template, sampling defaults and small files.

    Raises CheckpointError for a tokenizer that is none, or that llama.cpp would split text for in another way.
    """
    where = str(reader.path / "tokenizer.json")
    raw = side_file(reader, "tokenizer.json")
    if raw is None:
        raise CheckpointError(f"{reader.path} has no tokenizer.json", hint="copy it there: GGUF files hold it")
    named = side_object(reader, "tokenizer_config.json")
    try:
        tokenizer = parse_json(raw.decode("utf-8"))
        _require_pattern(tokenizer, where)
        tokens, types = _listed(tokenizer, arch.text.vocab_size, where)
        merges = [_merge(merge) for merge in tokenizer["model"]["merges"]]
        added = {str(token["content"]): int(token["id"]) for token in tokenizer["added_tokens"]}
        first = _first_special(tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a byte-level BPE tokenizer: {error!r}") from error
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids = _ids(named, added, arch)
    for name, index in ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(first is not None and added.get(first) == ids.get("bos"))
    writer.add_add_eos_token(False)
    writer.add_add_sep_token(False)
    template = side_file(reader, TEMPLATE)
    chosen = template.decode("utf-8", "replace") if template else named.get("chat_template")
    if chosen:
        writer.add_chat_template(chosen)
    _tell_files(writer, reader, arch)


def _require_pattern(tokenizer: Any, where: str) -> None:
    """llama.cpp knows the pre-tokenizer by name only: any other pattern would give other tokens there."""
    steps = tokenizer["pre_tokenizer"].get("pretokenizers", [tokenizer["pre_tokenizer"]])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if patterns != [SPLIT] or not any(step["type"] == "ByteLevel" for step in steps) or tokenizer.get("normalizer"):
        raise CheckpointError(
            f"{where} does not split text with Llama 4's pattern, llama.cpp would",
            hint="is this the tokenizer of a Llama 4 checkpoint?",
        )


def _listed(tokenizer: Any, vocab_size: int, where: str) -> tuple[list[str], list[int]]:
    """Every token by id, and its type; ids that nothing has are filled as llama.cpp's converter fills them."""
    if tokenizer["model"]["type"] != "BPE":
        raise ValueError(f"its model is {tokenizer['model']['type']}")
    found = {int(rank): (str(token), NORMAL) for token, rank in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        text = str(token["content"])
        control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
        found[int(token["id"])] = (text, CONTROL if control else USER_DEFINED)
    if min(found) < 0 or max(found) >= vocab_size:
        raise CheckpointError(f"{where} has token {max(found)}, config.json's vocab_size is {vocab_size}")
    tokens = [found.get(n, (f"[PAD{n}]", UNUSED)) for n in range(vocab_size)]
    return [token for token, _ in tokens], [kind for _, kind in tokens]


def _merge(merge: Any) -> str:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return f"{left} {right}"


def _first_special(tokenizer: Any) -> str | None:
    """The special token that the tokenizer puts before a text."""
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and len(step["single"]) > 1:
            name = step["single"][0].get("SpecialToken", {}).get("id")
            return None if name is None else str(name)
    return None


def _ids(named: Mapping[str, Any], added: Mapping[str, int], arch: Arch) -> dict[str, int]:
    """bos, eos and pad: as tokenizer_config.json spells them, else config.json's."""
    eos = arch.text.eos_token_ids[:1]
    ours = {"bos": arch.text.bos_token_id, "eos": eos[0] if eos else None, "pad": arch.text.pad_token_id}
    ids: dict[str, int] = {}
    for name in NAMED:
        spelled = named.get(f"{name}_token")
        spelled = spelled.get("content") if isinstance(spelled, dict) else spelled
        index = added.get(spelled, ours[name]) if isinstance(spelled, str) else ours[name]
        if index is not None:
            ids[name] = index
    return ids


def _tell_files(writer: Any, reader: Reader, arch: Arch) -> None:
    generation = side_object(reader, "generation_config.json")
    for name, key in SAMPLING.items():
        if isinstance(generation.get(name), int | float):
            getattr(writer, f"add_sampling_{key}")(float(generation[name]))
    for name in TEXT_FILES if arch.vision is None else TEXT_FILES + PICTURE_FILES:
        contents = side_file(reader, name)
        if contents is not None:
            writer.add_string(FILE_KEY + name, contents.decode("utf-8", "replace"))


def hf_files(metadata: Mapping[str, Any], arch: Arch, where: str) -> dict[str, bytes]:
    """Name → contents of what lies beside the weights in a Hugging Face folder. Raises CheckpointError."""
    files = small_files(arch)
    del files[TEMPLATE]
    own = {key.removeprefix(FILE_KEY): value for key, value in metadata.items() if key.startswith(FILE_KEY)}
    for name in (*TEXT_FILES, *PICTURE_FILES):
        if own and name in TEXT_FILES:
            files.pop(name)
        if isinstance(own.get(name), str) and (arch.vision is not None or name in TEXT_FILES):
            files[name] = own[name].encode()
    if not own:
        files |= _told(files, metadata, where)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and b'"chat_template"' not in files.get(TEXT_FILES[0], b""):
        files[TEMPLATE] = template.encode()
    return files | {"tokenizer.json": tokenizer_json(metadata, where).encode()}


def _told(files: Mapping[str, bytes], metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The small files with the named tokens and sampling values of a file that is not ours."""
    told = {name: json.loads(files[name]) for name in TEXT_FILES}
    tokens = _array(metadata, "tokens", str, where)
    for name, key in ID_KEYS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(index, int) and 0 <= index < len(tokens):
            for file in TEXT_FILES[:2]:
                told[file][f"{name}_token"] = tokens[index]
    for name, key in SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, float):
            told["generation_config.json"][name] = float(f"{value:.6g}")  # float32: 0.6000000238 is meant as 0.6
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in told.items()}


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> str:
    """tokenizer.json out of the tokens and merges. Raises CheckpointError for another kind of tokenizer."""
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in SAME_PATTERN:
        raise _not_llama4(where, f"it is {kind[0]!r}, split as {kind[1]!r}")
    tokens, types = _array(metadata, "tokens", str, where), _array(metadata, "token_type", int, where)
    if len(tokens) != len(types) or CONTROL not in types:
        raise _not_llama4(where, "it has no special tokens")
    first, last = types.index(CONTROL), len(types)
    while types[last - 1] == UNUSED:  # ids that nothing has
        last -= 1
    if any(one != NORMAL for one in types[:first]) or any(one != CONTROL for one in types[first:last]):
        raise _not_llama4(where, "its special tokens do not follow the others")
    special = tokens[first:last]
    if BOS not in special:
        raise _not_llama4(where, f"it has no {BOS}")
    try:
        base = [unspell(token) for token in tokens[:first]]
    except KeyError as error:
        raise _not_llama4(where, f"{error.args[0]!r} stands for no byte") from None
    pairs = []
    for merge in _array(metadata, "merges", str, where):
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise _not_llama4(where, f"{merge[:40]!r} is no merge")
        pairs.append((left, right))
    whole = {(tokens[left], tokens[right]) for left, right in merges_of(base)}
    return bpe_json(tokens[:first], pairs, special, ignore_merges=set(pairs) == whole)


def _array(metadata: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise _not_llama4(where, f"tokenizer.ggml.{key} is missing or no list of {kind.__name__}")
    return found


def _not_llama4(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: its tokenizer is not Llama 4's: {why}", hint="convert the model anew")
