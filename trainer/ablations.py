"""What the paper's choices are worth at a scale that a CPU affords: one baseline, one change at a time, several seeds.

The baseline is the paper's way in small: a UNet of 4 channels pretrained on pictures (`trainer.pretrain`), widened to the 16 of
plain atlases of 32 x 32 cells, and fine-tuned. Every variant changes one thing and is trained for as many steps on the same
batches and noise, so that differences are taken seed by seed.

runs/ablations/views, fits, atlases, shards    240 objects, as the farm leaves them; the 2D base sees all but the held-out ones
runs/ablations/shards-sphere                   those of eight kinds, which are learned in 3D: a model this small learns no more in minutes
runs/ablations/shards-own                      the same Gaussians, every object flattened by itself
runs/ablations/base                            the 2D base
runs/ablations/VARIANT-SEED/                   curve.json, made.safetensors (atlases of the prompts), scores.json
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from generator.atlas import Atlas, AtlasLayout, Normalization, NormalizationAccumulator, from_atlas
from generator.atlas import pack as pack_atlas
from generator.atlas.layout import cell_centres
from generator.errors import InputError
from generator.files import replacing
from generator.formats import load
from generator.gaussians import Gaussians
from generator.tensors import load_tensors, save_tensors

from . import dataset
from .evaluate.judge import Judge, evaluate_set, examples_from_shards, full_caption, look
from .finetune import FinetuneConfig, Trainer
from .fit import FitConfig
from .presets import PRESETS, Preset, small_unet
from .stages import averaged_pipeline, farm, pretrain, text_encoder_of
from .training_data import ShardedAtlases, TrainingData, from_shards
from .transport import assign

_SIZE = 32  # cells: a plain UNet trains on them in minutes, on one core

PRESET = replace(
    PRESETS["starter"],
    name="ablations",
    limit=240,
    size=_SIZE,
    recolour=0,
    fit=FitConfig(count=_SIZE**2),
    pretrain=FinetuneConfig(
        unet=small_unet((32, 64, 128), (False, False, True), size=_SIZE),
        prediction_type="sample",
        shift=3.0,
        batch_size=16,
        learning_rate=5e-4,
        ema_decay=0.995,
        max_steps=1_500,
        decay_steps=500,
        validation_share=0.1,  # held-out objects are unseen in pictures too
        checkpoint_every=250,
    ),
    pretrain_size=_SIZE,
    finetune=FinetuneConfig(
        prediction_type="sample",
        shift=3.0,
        batch_size=8,
        learning_rate=5e-4,
        ema_decay=0.99,
        max_steps=700,
        decay_steps=250,
        warmup_steps=50,
        channel_weights=PRESETS["starter"].finetune.channel_weights,
        validation_share=0.1,
        checkpoint_every=350,
    ),
)
# Matches the plainest caption of what is learned in 3D.
KINDS = r"(?:.+ )?(?:armchair|sofa|bed|table|lamp|car|plant|bottle)"
CURVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Variant:
    """One change to the baseline."""

    title: str  # a few words, for tables
    finetune: dict = field(default_factory=dict)  # what changes in the preset's `finetune`
    transferred: bool = True  # starts from the 2D base, else from random weights of the same shape
    flattening: str = "sphere"  # or "own": see `flattened`
    normalization: str = "cell"
    comparable: bool = True  # whether its loss is that of the baseline's values


VARIANTS = {
    "transferred": Variant("transferred from the 2D base (baseline)"),
    "scratch": Variant("from random weights", transferred=False),
    "renders": Variant("with losses on renders", {"rgb_weight": 10.0, "mask_weight": 10.0, "lpips_weight": 1.0, "render_from": 0.3}),
    "own": Variant("every object flattened by itself", flattening="own", comparable=False),
    "channel": Variant("normalised per channel", normalization="channel", comparable=False),
}
BASELINE = "transferred"


# Data ------------------------------------------------------------------------------------------------------------------


def prepare(preset: Preset, run: Path) -> None:
    """Views, fits and both kinds of atlases, their statistics and the 2D base; what is there is kept."""
    if not list((run / "shards").glob("*.tar")):
        farm(preset, run)
    for flattening in sorted({variant.flattening for variant in VARIANTS.values()}):
        if not list(_shards(run, flattening).glob("*.tar")):
            dataset.write_shards(_samples(preset, run, flattening), _shards(run, flattening))
    for flattening, kind in {(v.flattening, v.normalization) for v in VARIANTS.values()}:
        path = _statistics(run, flattening, kind)
        if not path.is_file():
            accumulator = None
            for sample, layout_id in dataset.read_shards(_shards(run, flattening)):
                accumulator = accumulator or NormalizationAccumulator(layout_id)
                accumulator.update(sample.values)
            if accumulator is None:
                raise InputError(f"no atlas in {_shards(run, flattening)}: delete the folder and run this again")
            accumulator.result(kind).save(path)
    if not (run / "base").is_dir():
        pretrain(preset, run)


def _shards(run: Path, flattening: str) -> Path:
    return run / f"shards-{flattening}"


def _statistics(run: Path, flattening: str, kind: str) -> Path:
    return run / f"normalization-{flattening}-{kind}.safetensors"


def _samples(preset: Preset, run: Path, flattening: str) -> Iterator[tuple[str, Atlas, dict]]:
    layout = AtlasLayout.load_default(preset.size)
    for sample, _ in dataset.read_shards(run / "shards"):
        if re.fullmatch(KINDS, sample.record["captions"][0]):
            atlas = Atlas(sample.values, layout.id, sample.spec)
            if flattening == "own":
                atlas = flattened(load(run / "fits" / f"{sample.record['object']}.ply"), layout, sample.spec)
            yield sample.id, atlas, sample.record


def flattened(gaussians: Gaussians, layout: AtlasLayout, spec=None) -> Atlas:
    """An atlas that is as smooth as the usual one, but whose cells mean something else in every object.

    The object is projected onto the plane of its own two widest directions, and that plane carried to the grid by optimal transport.

    Args:
        gaussians: as many as the layout has cells.

    Raises:
        InputError: another number of Gaussians.
    """
    if len(gaussians) != layout.count:
        raise InputError(f"{len(gaussians)} Gaussians do not fill {layout.count} cells: fit as many")
    centred = gaussians.means.double() - gaussians.means.double().mean(0)
    plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    cells = torch.from_numpy(assign(plane.numpy(), cell_centres(layout.size).numpy()).indices)
    return pack_atlas(gaussians[torch.argsort(cells)], layout, spec)


# Runs ------------------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, preset: Preset, run: Path) -> Path:
    """Train one variant with one seed and draw every object's caption; its folder. What is finished is kept, what was stopped goes on."""
    variant, folder = VARIANTS[name], run / f"{name}-{seed}"
    if (folder / "made.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(preset.finetune, seed=seed, **variant.finetune)
    config = replace(config, base=str(run / "base")) if variant.transferred else replace(config, unet=preset.pretrain.unet)
    trainer = Trainer(config, _training_data(variant, config, preset, run), folder / "finetune")
    trainer.resume()
    curve = [point for point in _read(folder / "curve.json", []) if point["step"] <= trainer.step]
    losses = []
    for step, loss in trainer.run():
        losses.append(loss)
        if step % CURVE_EVERY == 0 or step == config.max_steps:
            with trainer.averaged():
                held_out = trainer.validate()
            curve.append({"step": step, "train": sum(losses) / len(losses), "held_out": held_out})
            losses.clear()
            _write(folder / "curve.json", curve)
    atlases = trainer.data.atlases
    assert isinstance(atlases, ShardedAtlases)  # from shards
    captions = [full_caption(record) for record in atlases.records]
    with averaged_pipeline(preset, trainer) as pipeline:
        # The same noise for every variant: seeds count up from a number of the run's own.
        made = pipeline(captions, seed=1_000 * seed, batch_size=16, num_inference_steps=preset.steps, guidance_scale=preset.guidance_scale)
    values = torch.stack([atlas.values for atlas in made.atlases]).half()
    save_tensors(folder / "made.safetensors", {"atlases": values}, {"prompts": json.dumps(captions)})
    shutil.rmtree(folder / "finetune")
    return folder


def _training_data(variant: Variant, config: FinetuneConfig, preset: Preset, run: Path) -> TrainingData:
    normalization = Normalization.load(_statistics(run, variant.flattening, variant.normalization))
    layout = AtlasLayout.load_default(preset.size)
    return from_shards(_shards(run, variant.flattening), normalization, text_encoder_of(config), layout)


def made(folder: Path, preset: Preset) -> list[tuple[str, Gaussians]]:
    """What a run drew: prompts and Gaussians, as the pipeline gives them."""
    tensors, record = load_tensors(folder / "made.safetensors")
    layout = AtlasLayout.load_default(preset.size)
    objects = (from_atlas(Atlas(values.float(), layout.id, preset.channels), layout) for values in tensors["atlases"])
    low_pass = preset.views.low_pass
    widened = [gaussians.replace(scales=torch.sqrt(gaussians.scales**2 + low_pass**2)) for gaussians in objects]
    return list(zip(json.loads(record["prompts"]), widened, strict=True))


# Scores ----------------------------------------------------------------------------------------------------------------


def score(preset: Preset, run: Path) -> None:
    """Judge what every trained run drew, and the fits themselves; what is scored is kept."""
    layout = AtlasLayout.load_default(preset.size)
    todo = [path.parent for path in sorted(run.glob("*-*/made.safetensors")) if not (path.parent / "scores.json").is_file()]
    if not todo and (run / "ceiling.json").is_file():
        return
    if not (run / "judge.safetensors").is_file():
        Judge.train(examples_from_shards(run / "shards", layout)).save(run / "judge.safetensors")
    judge = Judge.load(run / "judge.safetensors")
    samples = [sample for sample, _ in dataset.read_shards(_shards(run, "sphere"))]
    fits = [from_atlas(Atlas(sample.values, layout.id, sample.spec), layout) for sample in samples]
    references = look(fits)
    for folder in todo:
        _write(folder / "scores.json", _numbers(evaluate_set(judge, made(folder, preset), references)))
    same = [(full_caption(sample.record), gaussians) for sample, gaussians in zip(samples, fits, strict=True)]
    # Each fit is judged by the head that has not seen it.
    _write(run / "ceiling.json", _numbers(evaluate_set(judge, same, None, [sample.record["object"] for sample in samples])))


def _numbers(scores: dict) -> dict[str, float]:
    return {key: value for key, value in scores.items() if isinstance(value, int | float)}


def finished(run: Path, name: str) -> list[int]:
    """The seeds of a variant that are trained and scored."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in run.glob(f"{name}-*/scores.json"))


def curve_of(run: Path, name: str, seed: int) -> list[dict]:
    """Mean training loss and held-out loss of the averaged network, every `CURVE_EVERY` steps."""
    return _read(run / f"{name}-{seed}" / "curve.json", [])


def scores_of(run: Path, name: str, seed: int) -> dict[str, float]:
    """The judge's numbers of a run, with its last held-out loss."""
    held_out = curve_of(run, name, seed)[-1]["held_out"]
    return {**_read(run / f"{name}-{seed}" / "scores.json", {}), "held_out_loss": held_out}


def ceiling(run: Path) -> dict[str, float]:
    """The judge's numbers of the fits under the same captions."""
    return _read(run / "ceiling.json", {})


def ablate(preset: Preset, run: Path, names: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Everything from objects to the page.

    Raises:
        InputError: no such variant, or too few of them for a comparison.
    """
    from .ablation_report import write

    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise InputError(f"no variant {', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    prepare(preset, run)
    for seed in seeds:
        for name in names:
            train(name, seed, preset, run)
    score(preset, run)
    write(preset, run, output)


def _read(path: Path, default):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _write(path: Path, value) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
