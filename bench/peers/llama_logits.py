"""What libllama makes of a GGUF file: logits of every position of a prompt, and the tokens that follow, greedily.

job: "build", "binding" as in llama_ragged.py, "gguf", "prompts" (token ids), "new_tokens", "texts" to be tokenized;
"out": where logits go, one .npy [tokens, V] for each prompt. Result: {"generated", "tokens", "version"}.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_ragged import bind
from measure import read_job, write_result


class Model:
    """One model and one context of one sequence, on the CPU."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.llama = llama = bind(job)
        self.quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self.quiet, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(job["gguf"].encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {job['gguf']}")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.vocab_size = llama.llama_vocab_n_tokens(self.vocab)
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 1024
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = 2
        params.flash_attn_type = 0
        self.context = llama.llama_init_from_model(self.model, params)
        self.batch = llama.llama_batch_init(1024, 0, 1)

    def logits(self, tokens: list[int], position: int) -> np.ndarray[Any, Any]:
        """[tokens, V] of tokens at position, position + 1, …"""
        for place, token in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position + place
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, 0
            self.batch.logits[place] = True
        self.batch.n_tokens = len(tokens)
        code = self.llama.llama_decode(self.context, self.batch)
        assert code == 0, f"llama_decode: {code}"
        address = self.llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(address, shape=(len(tokens), self.vocab_size)).copy()

    def run(self, prompt: list[int], new_tokens: int) -> tuple[np.ndarray[Any, Any], list[int]]:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        first = self.logits(prompt, 0)
        out = [int(first[-1].argmax())]
        while len(out) < new_tokens:
            out.append(int(self.logits(out[-1:], len(prompt) + len(out) - 1)[-1].argmax()))
        return first, out

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        tokens = (self.llama.llama_token * room)()
        count = self.llama.llama_tokenize(self.vocab, raw, len(raw), tokens, room, False, False)
        assert count >= 0
        return [int(token) for token in tokens[:count]]


def main() -> None:
    job = read_job()
    model = Model(job)
    generated = []
    for number, prompt in enumerate(job["prompts"]):
        logits, tokens = model.run(prompt, job["new_tokens"])
        np.save(f"{job['out']}/{number}.npy", logits)
        generated.append(tokens)
    info = ctypes.c_char_p(model.llama.llama_print_system_info()).value or b""
    tokens = [model.tokenize(text) for text in job["texts"]]
    write_result({"generated": generated, "tokens": tokens, "system": info.decode()})


if __name__ == "__main__":
    main()
