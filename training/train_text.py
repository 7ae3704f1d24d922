"""Makes the two small text encoders and their tokenizers, and teaches them the captions.

    python train_text.py --out text --steps 1500

Both learn to name every attribute of a scene from its caption: T5 through one attention query an attribute, CLIP
through its pooled vector. The heads are then thrown away. FluxPipeline passes no attention mask and pads to 64 up to
512 tokens, so T5 is trained unmasked at all those lengths and learns to look past the padding by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import COLOURS, GROUND_COLOURS, GROUND_KINDS, OBJECT_NAMES, PLACES, Scene, scenes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 128
CLIP_LENGTH = 77
CORPUS_START = 500_000_000
WORD_SCORE = -2.0  # any whole word beats any spelling of it by characters
CHARACTER_SCORE = -14.0


def _values() -> dict[str, tuple[str | None, ...]]:
    return {
        "first": OBJECT_NAMES,
        "first colour": (None, *COLOURS),
        "second": (None, *OBJECT_NAMES),
        "second colour": (None, *COLOURS),
        "relation": (None, "left", "above"),
        "place": (None, *PLACES),
        "size": (None, "small", "large"),
        "ground": GROUND_KINDS,
        "ground colour": (None, *GROUND_COLOURS),
    }


ATTRIBUTES = _values()


def attributes_of(scene: Scene) -> list[int]:
    """The index of each attribute's value, in the order of ATTRIBUTES."""
    second = scene.second
    said = {
        "first": scene.first.name,
        "first colour": scene.first.colour,
        "second": second.name if second else None,
        "second colour": second.colour if second else None,
        "relation": scene.relation,
        "place": scene.place,
        "size": scene.size,
        "ground": scene.ground.kind,
        "ground colour": scene.ground.colour,
    }
    return [values.index(said[name]) for name, values in ATTRIBUTES.items()]


def varied(caption: str, rng: random.Random) -> str:
    """The caption as a hasty or a careful writer would put it: capital, full stop, or all lower case."""
    chance = rng.random()
    if chance < 0.08:
        return caption[0].upper() + caption[1:]
    if chance < 0.12:
        return caption[0].upper() + caption[1:] + "."
    return caption.lower() if chance < 0.2 else caption


def corpus(count: int) -> list[str]:
    """Captions to build vocabularies from."""
    rng = random.Random(0)
    return [varied(scene.caption, rng) for scene in itertools.islice(scenes(CORPUS_START, taught=False), count)]


def build_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A unigram tokenizer: every word of the captions is one token, all else is spelled by characters."""
    pieces: Counter[str] = Counter()
    for caption in captions:
        for word in caption.split():
            bare = word.strip(".,")
            pieces["▁" + bare] += 1
            pieces.update(word[len(bare) :])
    total = sum(pieces.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, WORD_SCORE + 0.1 * (count / total)) for piece, count in pieces.most_common()]
    known = {piece for piece, _ in vocabulary}
    vocabulary += [(sign, CHARACTER_SCORE) for sign in ("▁", *string.printable.strip()) if sign not in known]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_clip_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pre_tokenizers_pattern(), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=1400, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(sign + "</w>" for sign in alphabet)]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {
        token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def pre_tokenizers_pattern() -> object:
    """CLIP's split: runs of letters, single digits, runs of other signs."""
    from tokenizers import Regex

    return Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def build_t5(vocabulary: int) -> T5EncoderModel:
    """An untrained T5 encoder, WIDTH wide."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=32, num_heads=4, d_ff=384, num_layers=2, num_decoder_layers=0,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
        )
    )  # fmt: skip


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model, WIDTH wide, pooled at the end token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CLIP_LENGTH, projection_dim=WIDTH, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class AttributeHeads(nn.Module):
    """Names the attributes from T5's tokens (one query each) and from CLIP's pooled vector; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [len(values) for values in ATTRIBUTES.values()]
        self.queries = nn.Parameter(torch.randn(len(sizes), WIDTH) * 0.1)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.from_tokens = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.from_pooled = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)

    def forward(self, tokens: Tensor, pooled: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, share right from tokens, share right from the pooled vector. tokens (B, L, W), targets (B, A)."""
        scores = torch.einsum("aw,blw->bal", self.queries, self.key(tokens)) / WIDTH**0.5
        found = scores.softmax(-1) @ tokens
        loss, right = tokens.new_zeros(()), []
        for index in range(targets.shape[1]):
            first, second = self.from_tokens[index](found[:, index]), self.from_pooled[index](pooled)
            loss = loss + F.cross_entropy(first, targets[:, index]) + F.cross_entropy(second, targets[:, index])
            right.append(
                torch.stack([(guess.argmax(-1) == targets[:, index]).float().mean() for guess in (first, second)])
            )
        share = torch.stack(right).mean(0)
        return loss / targets.shape[1], share[0], share[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    captions = corpus(20_000)
    t5_tokens, clip_tokens = build_t5_tokenizer(captions), build_clip_tokenizer(captions, args.out / "tokenizer")
    t5, clip = build_t5(len(t5_tokens)).to(args.device), build_clip(clip_tokens).to(args.device)
    heads = AttributeHeads().to(args.device)
    parameters = [*t5.parameters(), *clip.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=args.steps, pct_start=0.1)
    source, rng, began = scenes(CORPUS_START, taught=False), random.Random(1), time.monotonic()
    for step in range(args.steps):
        length = rng.choices((32, 64, 128, 256, 512), (60, 25, 8, 4, 3))[0]
        batch = list(itertools.islice(source, max(16, 128 * 32 // length)))
        words = [varied(scene.caption, rng) for scene in batch]
        ids = t5_tokens(words, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        pooled_ids = clip_tokens(
            words, padding="longest", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        targets = torch.tensor([attributes_of(scene) for scene in batch], device=args.device)
        tokens = t5(input_ids=ids.to(args.device)).last_hidden_state
        pooled = clip(input_ids=pooled_ids.to(args.device)).pooler_output
        loss, by_tokens, by_pooled = heads(tokens, pooled, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            spent = time.monotonic() - began
            print(
                f"{step} {spent:.0f}s length {length} loss {loss:.4f} right: t5 {by_tokens:.3f} clip {by_pooled:.3f}",
                flush=True,
            )
    for folder, part in (
        ("text_encoder", clip),
        ("text_encoder_2", t5),
        ("tokenizer", clip_tokens),
        ("tokenizer_2", t5_tokens),
    ):
        part.save_pretrained(args.out / folder)


if __name__ == "__main__":
    main()
