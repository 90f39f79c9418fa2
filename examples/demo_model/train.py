#!/usr/bin/env python3
"""Train the demo model: a small Llama 4 that answers the questions of questions.py and pictures.py.

  python examples/demo_model/train.py OUT                    from nothing to a checkpoint folder
  python examples/demo_model/train.py OUT --steps 500        a quick look
  python examples/demo_model/train.py OUT --polish OTHER     carry on with OTHER's weights
  python examples/demo_model/train.py OUT --arch maverick    dense layers between the MoE layers, no QK norm

Training text and pictures are drawn while it runs, from everything that is not held out. The same options give the same
weights on the same kind of machine. OUT/training.jsonl is the log.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run by its path, a script sees only its own folder
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from batch.tokenizer import Tokenizer  # noqa: E402
from converters.arch_io import arch_from_config  # noqa: E402
from converters.hf_side_files import small_files  # noqa: E402
from converters.names import hf_rows  # noqa: E402
from converters.writer import ShardFile, TensorSpec, plan_shards, write_index  # noqa: E402
from examples.demo_model.encoding import Encoder, collate  # noqa: E402
from examples.demo_model.initial import new_parameters  # noqa: E402
from examples.demo_model.muon import Muon  # noqa: E402
from examples.demo_model.network import Network, Parameters, Seen  # noqa: E402
from examples.demo_model.pictures import PAINTS, PICTURE_TASKS, SHAPES, TILE  # noqa: E402
from examples.demo_model.questions import TEXT_TASKS, Draw, Task  # noqa: E402
from examples.make_checkpoint import train_tokenizer  # noqa: E402
from l4tool.core.arch import Arch  # noqa: E402
from l4tool.core.atomic import write_file  # noqa: E402
from l4tool.core.prompt import NUM_SPECIAL, special_ids  # noqa: E402

VOCAB_SIZE = 896 + NUM_SPECIAL
TASKS: tuple[Task, ...] = (*TEXT_TASKS, *PICTURE_TASKS)
LONGEST_AT = 0.3  # of the training: until then texts and pictures hold fewer things
CARD = Path(__file__).with_name("card.md")
STEPS = 7000
EXAMINED = 50  # held-out questions of each task, now and then while it trains


def model_config(arch: str = "scout") -> dict[str, Any]:
    """config.json: everything that Scout has, small. In-features are multiples of 128, so that INT4 applies."""
    ids = special_ids(VOCAB_SIZE - NUM_SPECIAL)
    scout = arch == "scout"
    layers, step = 4, 1 if scout else 2
    text = {
        "model_type": "llama4_text", "dtype": "bfloat16", "vocab_size": VOCAB_SIZE, "hidden_size": 128,
        "intermediate_size": 128, "intermediate_size_mlp": 256, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": step, "moe_layers": list(range(step - 1, layers, step)), "use_qk_norm": scout,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
            "high_freq_factor": 1.0, "original_max_position_embeddings": 256,
        } if scout else {"rope_type": "default", "rope_theta": 500000.0},
        "no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)],
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "chunked_attention" for i in range(layers)],
        "attention_chunk_size": 128, "attn_temperature_tuning": True, "floor_scale": 64, "attn_scale": 0.1,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
        "pad_token_id": ids["<|finetune_right_pad|>"],
    }  # fmt: skip
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": "bfloat16",
        "boi_token_index": ids["<|image_start|>"], "eoi_token_index": ids["<|image_end|>"],
        "image_token_index": ids["<|patch|>"], "tie_word_embeddings": False, "text_config": text,
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4,
            "num_hidden_layers": 3, "image_size": TILE, "patch_size": 14, "num_channels": 3, "projector_input_dim": 128,
            "projector_output_dim": 128, "vision_output_dim": 128, "hidden_act": "gelu", "pixel_shuffle_ratio": 0.5,
            "norm_eps": 1e-5, "multi_modal_projector_bias": False, "vision_feature_select_strategy": "default",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }  # fmt: skip


def corpus(seed: int, conversations: int = 4000) -> Iterator[str]:
    """What the tokenizer is trained on: the questions, without digits, so that each digit stays a token of its own."""
    draw = Draw(random.Random(seed), held_out=False)
    no_digits = str.maketrans("0123456789", " " * 10)
    for number in range(conversations):
        made = TASKS[number % len(TASKS)](draw)
        yield from (text.translate(no_digits) for turn in made.turns for text in turn)
        yield from (made.system or "", "system", "user", "assistant")


def right_share(network: Network, encoder: Encoder, task: Task, number: int, pad: int) -> float:
    """Share of held-out questions whose whole answer the network foretells; the same questions every time."""
    draw = Draw(random.Random(7), held_out=True)
    examples = [encoder.encode(task(draw)) for _ in range(number)]
    with torch.no_grad():
        batch = collate(examples, pad)
        logits, _ = network.forward(batch.tokens, batch.real, batch.tiles, batch.wanted)
    wrong = batch.owner[logits.argmax(-1) != batch.targets]
    return 1 - len(wrong.unique()) / number


@dataclass(frozen=True)
class Company:
    """The processes that train one network together, each on conversations of its own."""

    rank: int = 0
    size: int = 1

    def average(self, parameters: Parameters) -> None:
        """Gradients, the same in every process afterwards."""
        if self.size == 1:
            return
        for tensor in parameters.values():
            if tensor.grad is None:  # the vision tower's, in a batch without pictures
                tensor.grad = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in parameters.values() if tensor.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.size)

    def gather(self, mine: Any) -> list[Any]:
        """Everybody's `mine`, by rank."""
        found = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(found, mine)
        return found


def train(
    arch: Arch, encoder: Encoder, arguments: argparse.Namespace, log: Path, company: Company,
    save: Callable[[Parameters], None],
) -> Network:  # fmt: skip
    """The whole training; for each examination a line of `log`, and what is learnt is saved. `arguments.batch` is for
    each process."""
    rng = random.Random(f"{arguments.seed} {company.rank}")
    if arguments.polish:
        network = Network(arch, read_parameters(arguments.polish))
    else:
        network = Network(arch, new_parameters(arch, encoder.tokenizer, arguments.seed))
    words = sorted({"", *SHAPES, *PAINTS, *"0123456789"})
    eyes = Seen(arch, words, arguments.seed)
    trained = network.parameters | {"embedding of what is seen": eyes.heads}
    optimizer = Muon(trained, arguments.adam_rate, arguments.muon_rate)
    pad = arch.text.pad_token_id
    assert pad is not None
    error = [1.0] * len(TASKS)  # share of training conversations answered wrongly, of late
    began_s, losses = time.monotonic(), []
    before = json.loads(log.read_text().splitlines()[-1]) if arguments.polish else {"step": 0, "minutes": 0}
    routed = torch.zeros(len(arch.text.moe_layers), arch.text.num_experts)
    for step in range(arguments.steps + 1):
        progress = step / arguments.steps
        is_last = step in (arguments.steps, arguments.until)
        if is_last or (step % arguments.every == 0 and (step > 0 or not arguments.polish)):
            mine = {task.__name__: right_share(network, encoder, task, EXAMINED, pad)
                    for task in TASKS[company.rank :: company.size]}  # fmt: skip
            everyone = company.gather((mine, routed))
            if company.rank == 0:
                found = {name: share for part, _ in everyone for name, share in part.items()}
                shares = {task.__name__: found[task.__name__] for task in TASKS}
                all_routed = torch.stack([part for _, part in everyone]).sum(0)
                note(log, before, step, time.monotonic() - began_s, losses, shares, all_routed)
                save(network.parameters)
            losses = []
            routed.zero_()
        if is_last:
            break
        growth = 1.0 if arguments.polish else min(1.0, progress / LONGEST_AT)
        draw = Draw(rng, held_out=False, growth=growth)
        chosen = rng.choices(range(len(TASKS)), [0.1 + share for share in error], k=arguments.batch)
        made = sorted(((task, encoder.encode(TASKS[task](draw))) for task in chosen), key=lambda pair: len(pair[1].ids))
        weights = [1.0] * len(made)  # all answers' tokens count the same: long answers teach to copy
        if arguments.polish:  # a conversation counts by what is wrong with its task, however short its answers are
            weights = [(0.1 + error[task]) / sum(e.answer) for task, e in made]
        whole = sum(weight * sum(e.answer) for weight, (_, e) in zip(weights, made, strict=True))
        total = 0.0
        for first in range(0, len(made), arguments.group):  # of about the same length: little padding
            group = made[first : first + arguments.group]
            batch = collate([e for _, e in group], pad)
            logits, other = network.forward(batch.tokens, batch.real, batch.tiles, batch.wanted)
            each = torch.tensor(weights[first : first + arguments.group])[batch.owner]
            loss = (F.cross_entropy(logits, batch.targets, reduction="none") * each).sum() / whole
            share = len(group) / len(made)
            extra = 0.01 * share * other.loss
            if other.features is not None:
                extra = extra + share * eyes.loss(other.features, batch.seen)
            (loss + extra).backward()
            wrong = set(batch.owner[logits.argmax(-1) != batch.targets].tolist())
            for row, (task, _) in enumerate(group):  # what is not learnt yet is asked more often
                error[task] += 0.01 * ((row in wrong) - error[task])
            total += loss.item()
            routed += other.counts
        company.average(trained)
        optimizer.step(min(1.0, (step + 1) / 100) * schedule(progress))
        losses.append(total)
    return network


def note(
    log: Path, before: dict[str, Any], step: int, elapsed_s: float, losses: list[float], shares: dict[str, float],
    routed: torch.Tensor,
) -> None:  # fmt: skip
    """A line of the log, and the same on the screen; `before`: the last line of the training that this one polishes."""
    spread = (routed / routed.sum(1, keepdim=True).clamp(min=1)).tolist()
    entry = {
        "step": before["step"] + step, "minutes": round(before["minutes"] + elapsed_s / 60, 2),
        "loss": round(sum(losses) / max(1, len(losses)), 4),
        "right": {name: round(share, 3) for name, share in shares.items()},
        "routing": [[round(share, 3) for share in layer] for layer in spread],
    }  # fmt: skip
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    right = " ".join(f"{name} {share:.0%}" for name, share in shares.items())
    print(f"step {entry['step']}, {entry['minutes']} min, loss {entry['loss']}: {right}", flush=True)


def schedule(progress: float) -> float:
    """Constant for the first 30 %, then down to 2 % along a line."""
    return min(1.0, 0.02 + 0.98 * (1 - progress) / 0.7)


def read_parameters(folder: Path) -> Parameters:
    """What `write_checkpoint` wrote, in float32, to be trained further."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.float().requires_grad_() for file in files for name, tensor in file.items()}


def write_checkpoint(folder: Path, config: dict[str, Any], parameters: Parameters) -> None:
    """Weights in bfloat16, index and config.json; the side files are there already."""
    arch = arch_from_config(config, "the demo model's config")
    specs = [TensorSpec(row.stored, row.shape, torch.bfloat16) for row in hf_rows(arch)]
    plans = plan_shards(specs)
    for plan in plans:
        shard = ShardFile(folder, plan)
        for spec in plan.specs:
            shard.write(spec.name, parameters[spec.name].detach().to(torch.bfloat16), row=0)
        shard.finish()
    write_index(folder, plans)
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_side_files(folder: Path, config: dict[str, Any], seed: int) -> None:
    arch = arch_from_config(config, "the demo model's config")
    write_file(folder / "README.md", CARD.read_bytes())
    write_file(folder / "tokenizer.json", train_tokenizer(arch.text.vocab_size, corpus(seed)))
    for name, content in small_files(arch).items():
        if name == "generation_config.json":  # one right answer: greedy
            content = json.dumps({k: v for k, v in json.loads(content).items() if k not in ("temperature", "top_p")}
                                 | {"do_sample": False}, indent=2).encode() + b"\n"  # fmt: skip
        write_file(folder / name, content)


def work(rank: int, size: int, arguments: argparse.Namespace, meeting: str) -> None:
    """One process of the training; the first one writes the checkpoint."""
    if size > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    config = model_config(arguments.arch)
    arch = arch_from_config(config, "the demo model's config")
    encoder = Encoder(Tokenizer.load(arguments.out), arch)
    log = arguments.out / "training.jsonl"
    train(arch, encoder, arguments, log, Company(rank, size), partial(write_checkpoint, arguments.out, config))
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--arch", choices=["scout", "maverick"], default="scout")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many updates")
    parser.add_argument("--until", type=int, help="stop after so many of them")
    parser.add_argument("--polish", type=Path, metavar="CHECKPOINT", help="carry on with the weights of this one: all "
                        "tasks at full length, and what is answered wrongly counts more")  # fmt: skip
    parser.add_argument("--processes", type=int, default=2, help="each on one core, with a batch of its own")
    parser.add_argument("--batch", type=int, default=32, help="conversations of one process in one update")
    parser.add_argument("--group", type=int, default=16, help="of which so many are computed together")
    parser.add_argument("--every", type=int, default=500, help="updates between two examinations")
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--muon-rate", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_side_files(arguments.out, model_config(arguments.arch), arguments.seed)
    log = (arguments.polish / "training.jsonl").read_bytes() if arguments.polish else b""
    (arguments.out / "training.jsonl").write_bytes(log)
    with tempfile.TemporaryDirectory() as folder:
        start = (arguments.processes, arguments, f"{folder}/meeting")
        if arguments.processes == 1:
            work(0, *start)
        else:
            torch.multiprocessing.spawn(work, start, nprocs=arguments.processes)


if __name__ == "__main__":
    main()
