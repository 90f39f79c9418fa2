"""JSONL in, JSONL out: schema, chat, images, job, backends, engine, model and kernels."""
