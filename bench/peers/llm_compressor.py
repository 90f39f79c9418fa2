"""llm-compressor on job["checkpoint"]: the whole program, imports included, as its user runs it.

`way`: "oneshot" (right for Llama 4: unfuses the experts) or "model_free" (streams files, but cuts fused experts along
the wrong dimension, so its time is a bound, not a result).
"""

from __future__ import annotations

from measure import Timed, peak_rss_bytes, read_job, write_result

IGNORE = ["re:.*lm_head$", "re:.*router$", "re:.*self_attn.*", "re:vision_model.*", "re:multi_modal_projector.*"]


def oneshot(source: str, out: str, scheme: str) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import Llama4ForConditionalGeneration

    with load_quantizable_moe(Llama4ForConditionalGeneration):
        model = Llama4ForConditionalGeneration.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORE))
    model.save_pretrained(out, save_compressed=True)


def model_free(source: str, out: str, scheme: str) -> None:
    from llmcompressor import model_free_ptq

    model_free_ptq(model_stub=source, save_directory=out, scheme=scheme, ignore=IGNORE, device="cpu")


def main() -> None:
    job = read_job()
    with Timed() as timed:
        {"oneshot": oneshot, "model_free": model_free}[job["way"]](job["checkpoint"], job["out"], job["scheme"])
    write_result({"seconds": timed.seconds, "cpu_s": timed.cpu_s, "peak_rss_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main()
