"""CLIP score (Hessel et al. 2021, without the factor 2.5 and the cut at zero), where someone has the weights."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from generator.errors import InputError
from generator.model.text import sha256

# Of OpenAI's models and those that keep their preprocessing.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model of transformers.

    Args:
        source: a folder with model and tokenizer, or a hub id such as openai/clip-vit-base-patch32, which is downloaded.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"--clip {source}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        self.size = self.model.config.vision_config.image_size
        weights = Path(source) / "model.safetensors"
        # What the numbers depend on, so that others can have the same ones.
        revision = f"sha256 {sha256(weights)[:16]}" if weights.is_file() else getattr(self.model.config, "_commit_hash", None)
        self.name = f"{Path(source).name if weights.is_file() else source} ({revision}), transformers {version('transformers')}"

    @torch.no_grad()
    def score(self, pictures: Tensor, prompt: str) -> float:
        """100 times the mean cosine of a prompt and pictures [V, 3, H, W] in 0..1."""
        sized = interpolate(pictures, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], return_tensors="pt", truncation=True, max_length=limit)
        outputs = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=(sized - mean) / deviation
        )
        images, text = normalize(outputs.image_embeds, dim=-1), normalize(outputs.text_embeds, dim=-1)
        return 100 * (images @ text.T).mean().item()
