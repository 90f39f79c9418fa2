"""What llama.cpp's libmtmd makes of a picture: the features that its vision tower gives for a tile.

job: "gguf", "mmproj", "pixels" (an .npy, uint8 [side, side, 3], as large as a tile), "out" (.npy: float32 [tokens, H]).
"""

from __future__ import annotations

import ctypes

import numpy as np
from llama_cpp import llama_cpp as llama
from llama_cpp import mtmd_cpp as mtmd
from measure import read_job

IMAGE = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE


def main() -> None:
    job = read_job()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(job["gguf"].encode(), llama.llama_model_default_params())
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = False
    params.n_threads = 2
    context = mtmd.mtmd_init_from_file(job["mmproj"].encode(), model, params)
    if not context:
        raise SystemExit(f"libmtmd does not load {job['mmproj']}")
    pixels = np.ascontiguousarray(np.load(job["pixels"]))
    raw = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], raw)
    text = mtmd.mtmd_input_text()
    text.text = marker = mtmd.mtmd_default_marker()
    text.text_len, text.add_special, text.parse_special = len(marker), False, True
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    width = llama.llama_model_n_embd(model)
    features = []
    for number in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, number)
        if mtmd.mtmd_input_chunk_get_type(chunk) != IMAGE:
            continue
        assert mtmd.mtmd_encode_chunk(context, chunk) == 0
        tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        features.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape=(tokens, width)).copy())
    np.save(job["out"], np.concatenate(features))


if __name__ == "__main__":
    main()
