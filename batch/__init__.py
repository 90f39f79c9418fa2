"""JSONL in, JSONL out: schema, chat, images, job, backends, engine, model and kernels."""

import os as _os

# Idle OpenMP threads spin after every parallel region; on a busy machine that takes the cores from whoever works.
# libgomp reads this when torch loads it, so it stands here, before anything in `batch` imports torch.
_os.environ.setdefault("GOMP_SPINCOUNT", "20000")
