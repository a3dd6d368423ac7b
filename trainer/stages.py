"""The stages from objects to a bundle. Each reads what the one before left in the run's folder, and can be run again.

records.jsonl                  seconds, bytes, scores, attempts and failures of every object
views/ID.npz, views.jsonl      rendered objects
fits/ID.ply, ID.json           fitted Gaussians and how well they show held-out views; or imported ones and their records
atlases/ID.safetensors         their atlases, gathered in shards/atlases-*.tar
normalization.safetensors      statistics of the shards
finetune/checkpoint-*/         the network
bundle/                        what the generator loads
evaluation/                    pictures and scores
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from generator.atlas import Atlas, AtlasLayout, Normalization, NormalizationAccumulator, NormalScoresAccumulator, from_atlas
from generator.atlas import pack as pack_atlas
from generator.coverage import coverage
from generator.errors import InputError, WorkError
from generator.files import replacing
from generator.formats import load, save
from generator.model.bundle import REGRESSION_SHARES
from generator.model.prior import AtlasPrior, PriorAccumulator
from generator.model.regression import RegressionBuilder, TextRegression, variances_of
from generator.model.text import TextEncoder
from generator.tensors import decode_tensors, save_tensors

from . import captions, dataset
from .base import load_base, text_encoder
from .farm import RECORDS, append_records, for_each, read_records
from .finetune import FinetuneConfig, Trainer, checkpoints
from .fit import FitConfig
from .presets import Preset
from .sources import SourceObject, colours_in, credit_lines, credits, open_source, recoloured, with_colour
from .training_data import TrainingData, from_shards, statistics_of

if TYPE_CHECKING:
    from generator.model.pipeline import GaussianAtlasPipeline

_PRIOR = "prior.safetensors"
_EVALUATION_VIEWS = 4  # a first look: the paper's 10 take longer than a tiny model's training may

# What of a fit's JSON goes into its record.
_SCORES = ("psnr", "psnr_foreground", "ssim", "perceptual", "perceptual_name", "gaussians")


def views(preset: Preset, run: Path) -> None:
    """Render the preset's objects from all sides."""
    from .views import render_objects, select_records

    objects = [source for spec in preset.sources for source in open_source(spec, run.parent / "sources", preset.workers)]
    objects = preset.select(objects)
    # Refuses a folder that was rendered with other settings before anything is done.
    render_objects([], run / "views", preset.views)
    select_records(run / "views", [source.id for source in objects])
    records = render_objects(objects, run / "views", preset.views, workers=preset.workers, address=preset.address)
    failed = [record for record in records if record["status"] != "ok"]
    _say(f"views: {len(records) - len(failed)} of {len(records)} objects rendered")
    for record in failed:
        _say(f"  {record['id']}: {record['reason']}")
    if len(failed) == len(records):
        raise WorkError(f"no object could be rendered; the first says: {failed[0]['reason']}")


def fit(preset: Preset, run: Path) -> None:
    """Fit Gaussians to the views of every object."""
    run = Path(os.path.abspath(run))  # workers may start elsewhere
    sources = _selected("fit", run, run / "views", ".npz", "views")
    (run / "fits").mkdir(parents=True, exist_ok=True)
    todo, found = [], {}
    for path in sources:
        output = run / "fits" / f"{path.stem}.ply"
        if _is_fitted(output, preset.fit):
            found[path.stem] = output
        else:
            todo.append((path.stem, path, output, preset.fit))
    _note_found(run, "fit", found, _read_scores)
    failures = for_each(_fit_one, todo, preset.workers, "fit", records=run / RECORDS, address=preset.address, gpus=preset.gpus)
    _report("fit", len(sources), failures, len(sources) - len(failures))


def _fit_one(_identifier: str, views_path: Path, output: Path, config: FitConfig) -> dict:
    from .fit import fit as fit_views
    from .views import DamagedViews, Views

    torch.set_num_threads(1)
    try:
        seen = Views.load(views_path)
    except DamagedViews:
        # While it is there nothing would render it again.
        views_path.unlink(missing_ok=True)
        raise
    result = fit_views(seen, config)
    scores = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "gaussians"}
    scores = {name: round(value, 3) if isinstance(value, float) else value for name, value in scores.items()}
    # A score that could not be had is left out: NaN is no JSON.
    scores = {name: value for name, value in scores.items() if value == value}
    scores |= {"gaussians": len(result.gaussians), "settings": _settings_hash(config)}
    # The .ply comes last: the stages after this one go by it. An older one must not pass for that of the new JSON.
    output.unlink(missing_ok=True)
    _write_text(output.with_suffix(".json"), json.dumps(scores))
    save(result.gaussians, output)
    return _read_scores(output)


def _settings_hash(config: FitConfig) -> str:
    """What makes a fit out of date when it changes."""
    return _hash(replace(config, perceptual_score=True))


def _is_fitted(output: Path, config: FitConfig) -> bool:
    """Whether a fit with these settings is there. An imported one, or one from before settings were kept, is not ours to repeat."""
    if not (output.is_file() and output.with_suffix(".json").is_file()):
        return False
    settings = json.loads(output.with_suffix(".json").read_text(encoding="utf-8")).get("settings")
    return settings is None or settings == _settings_hash(config)


def _read_scores(output: Path) -> dict:
    """What the record of a fit holds, from the files that it left."""
    scores = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    seconds = scores.pop("seconds", None)
    # An imported fit keeps the object's captions and credits there too: they are no scores.
    scores = {name: value for name, value in scores.items() if name in _SCORES}
    return {"seconds": {} if seconds is None else {"fit": seconds}, "bytes": {"fits": output.stat().st_size}, **scores}


def atlas(preset: Preset, run: Path) -> None:
    """Transport every good fit to the sphere, and gather the atlases with their captions in shards."""
    run = Path(os.path.abspath(run))
    layout = AtlasLayout.load_default(preset.size, preset.projection)
    fits = _selected("atlas", run, run / "fits", ".ply", "fit")
    kept = [path for path in fits if _is_good(path, preset)]
    _say(f"atlas: {len(kept)} of {len(fits)} fits reach {preset.minimum_psnr} dB on held-out views or are imported")
    (run / "atlases").mkdir(parents=True, exist_ok=True)
    todo, found = [], {}
    for path in kept:
        output = run / "atlases" / f"{path.stem}.safetensors"
        if _is_current(output, path, layout, preset):
            found[path.stem] = output
        else:
            todo.append((path.stem, path, output, preset))
    _note_found(run, "atlas", found, _atlas_record)
    failures = for_each(_atlas_one, todo, preset.workers, "atlas", records=run / RECORDS, address=preset.address)
    _report("atlas", len(kept), failures, len(kept) - len(failures))
    _gather(preset, run, [path.stem for path in kept if path.stem not in failures])


def _is_good(fit_path: Path, preset: Preset) -> bool:
    """Whether a fit is good enough to be learned; an imported one has no views to be judged by, its PSNR is null.

    One whose PSNR could not be had is not, nor one without its JSON: it is of a run that was killed, and the fit stage repeats it.
    """
    try:
        score = json.loads(fit_path.with_suffix(".json").read_text(encoding="utf-8")).get("psnr", float("nan"))
    except FileNotFoundError:
        return False
    return score is None or score >= preset.minimum_psnr


def _atlas_one(_identifier: str, fit_path: Path, output: Path, preset: Preset) -> dict:
    from .atlas import to_atlas

    torch.set_num_threads(1)
    layout = AtlasLayout.load_default(preset.size, preset.projection)
    start = time.perf_counter()
    result = to_atlas(load(fit_path), layout, preset.transport, spec=preset.channels)
    tensors, record = decode_tensors(result.encode())
    save_tensors(output, tensors, {**record, "transport": preset.transport})
    return {"seconds": {"atlas": round(time.perf_counter() - start, 3)}, **_atlas_record(output)}


def _atlas_record(output: Path) -> dict:
    return {"bytes": {"atlases": output.stat().st_size}}


def _note_found(run: Path, stage: str, found: dict[str, Path], read: Callable[[Path], dict]) -> None:
    """Records for objects whose files are there but whose record is not: the run was killed in between, or kept none."""
    known = {r["id"] for r in read_records(run / RECORDS) if r.get("stage") in (stage, "farm") and r.get("status") == "ok"}
    lost = []
    for identifier, output in found.items():
        if identifier not in known:
            scores = read(output)
            record = {"seconds": scores.pop("seconds", {}), "bytes": scores.pop("bytes"), "scores": scores}
            lost.append({"id": identifier, "stage": stage, "status": "ok", "reason": "", **record, "attempts": 0})
    if lost:
        append_records(run / RECORDS, lost)


def farm(preset: Preset, run: Path) -> None:
    """Views, fit and atlas of an object in one task, so that a whole cluster is busy to the end; then the shards, by the records."""
    from .views import render_objects, select_records, views_path

    run = Path(os.path.abspath(run))
    layout = AtlasLayout.load_default(preset.size, preset.projection)
    objects = preset.select([source for spec in preset.sources for source in open_source(spec, run.parent / "sources", preset.workers)])
    chosen = {source.id for source in objects}
    # Refuses a folder that was rendered with other settings before anything is done.
    render_objects([], run / "views", preset.views)
    for folder in ("fits", "atlases"):
        (run / folder).mkdir(exist_ok=True)
    recipe = _recipe(preset, layout)

    def done() -> dict[str, bool]:
        records = (r for r in read_records(run / RECORDS) if r.get("stage") == "farm" and r.get("status") == "ok")
        current = {r["id"]: r["scores"]["kept"] for r in records if r["scores"]["recipe"] == recipe}
        return {name: kept for name, kept in current.items() if not kept or (run / "atlases" / f"{name}.safetensors").is_file()}

    before = done()
    _say_left_out("farm", len(before.keys() - chosen))
    todo = [(s.id, replace(s, path=Path(os.path.abspath(s.path))), run, preset, recipe) for s in objects if s.id not in before]
    failures = for_each(_object_one, todo, preset.workers, "farm", records=run / RECORDS, address=preset.address, gpus=preset.gpus)
    # Everything is rendered: this writes views.jsonl, with the captions and credits.
    render_objects([s for s in objects if views_path(run / "views", s.id).is_file()], run / "views", preset.views, progress=False)
    select_records(run / "views", chosen)
    ended = {name: good for name, good in done().items() if name in chosen}
    kept = sorted(name for name, good in ended.items() if good)
    _report("farm", len(objects), failures, len(objects) - len(failures))
    _say(f"farm: {len(kept)} of {len(ended)} fits reach {preset.minimum_psnr} dB on held-out views")
    if not kept:
        raise WorkError(f"farm: no fit reaches {preset.minimum_psnr} dB on held-out views: lower --minimum-psnr")
    _gather(preset, run, kept)


def _recipe(preset: Preset, layout: AtlasLayout) -> str:
    """What makes a finished object out of date when it changes."""
    return _hash((layout.id, preset.channels, preset.transport, preset.minimum_psnr, _settings_hash(preset.fit)))


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _object_one(identifier: str, source: SourceObject, run: Path, preset: Preset, recipe: str) -> dict:
    from .views import import_blender, render_object, views_path

    # Loaded before anything is timed: not to be counted with the first object.
    for module in ("atlas", "fit", "scene"):
        importlib.import_module(f".{module}", __package__)

    torch.set_num_threads(1)
    pixels = views_path(run / "views", identifier)
    output = run / "fits" / f"{identifier}.ply"
    cells = run / "atlases" / f"{identifier}.safetensors"
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    if not pixels.is_file():
        import_blender()
        with _step("views", seconds, cpu):
            render_object(source, preset.views).save(pixels)
    if not _is_fitted(output, preset.fit):
        with _step("fit", seconds, cpu):
            _fit_one(identifier, pixels, output, preset.fit)
    record = _read_scores(output)
    record["bytes"]["views"] = pixels.stat().st_size
    kept = _is_good(output, preset)
    if kept:
        if not _is_current(cells, output, AtlasLayout.load_default(preset.size, preset.projection), preset):
            with _step("atlas", seconds, cpu):
                _atlas_one(identifier, output, cells, preset)
        record["bytes"] |= _atlas_record(cells)["bytes"]
    return {**record, "seconds": seconds, "cpu": cpu, "kept": kept, "recipe": recipe}


@contextmanager
def _step(name: str, seconds: dict[str, float], cpu: dict[str, float]) -> Iterator[None]:
    """Times a step of an object, and names it where it fails."""
    start, busy = time.perf_counter(), time.process_time()
    try:
        yield
    except Exception as error:
        raise WorkError(f"{name} failed: {error}") from error
    seconds[name], cpu[name] = round(time.perf_counter() - start, 3), round(time.process_time() - busy, 3)


def _gather(preset: Preset, run: Path, identifiers: Iterable[str]) -> None:
    """Write the shards of some objects, from their atlases and the records of views and fits."""
    from .views import read_records as read_views

    layout = AtlasLayout.load_default(preset.size, preset.projection)
    records = {record["id"]: record for record in read_views(run / "views")}

    def samples() -> Iterator[tuple[str, Atlas, dict]]:
        for identifier in identifiers:
            stored = Atlas.decode((run / "atlases" / f"{identifier}.safetensors").read_bytes())
            scores = json.loads((run / "fits" / f"{identifier}.json").read_text(encoding="utf-8"))
            record = {**records.get(identifier, {}), **scores}
            for key in ("status", "reason", "seconds", "size", "selected", "imported"):
                record.pop(key, None)
            if not record.get("captions") or "id" not in record:
                raise InputError(f"{identifier} has no captions in {run / 'views' / 'views.jsonl'}: run `python -m trainer views` again")
            yield from _variants(stored, layout, record, preset)

    dataset.write_shards(samples(), run / "shards")


def _variants(original: Atlas, layout: AtlasLayout, record: dict, preset: Preset) -> Iterator[tuple[str, Atlas, dict]]:
    """An atlas under its own captions, and repainted under captions that say so.

    Transport looks at positions alone, so a repainted object keeps its cells.
    """
    from .evaluate.prompts import gives_away

    gaussians = from_atlas(original, layout)
    colour = captions.dominant_colour(gaussians)
    plain = record["captions"]
    own = [with_colour(caption, colour) for caption in plain] if colour else []
    identifier = record["id"]
    told = [caption for caption in dict.fromkeys(plain + own) if not gives_away(caption)] or plain[:1]
    yield identifier, original, {**record, "object": identifier, "colour": colour or "", "captions": told}
    keeps = preset.never_recolour and re.search(rf"\b(?:{preset.never_recolour})\b", plain[0])
    if not colour or keeps:
        return
    if colours_in(plain[0]):  # the name itself holds a colour: "black table"
        return
    others = [word for word in captions.COLOURS if word != colour]
    # Which colours an object gets depends on its id alone, so that a larger set repeats a smaller one.
    random.Random(identifier).shuffle(others)
    for target in others[: preset.recolour]:
        named = list(dict.fromkeys(text for caption in plain if (text := recoloured(caption, colour, target))))
        # What the evaluation asks for stays unseen.
        if any(map(gives_away, named)):
            continue
        painted = pack_atlas(captions.recolour(gaussians, colour, target), layout, original.spec)
        yield f"{identifier}-{target}", painted, {**record, "object": identifier, "colour": target, "captions": named}


def _is_current(path: Path, fit_path: Path, layout: AtlasLayout, preset: Preset) -> bool:
    """Whether a stored atlas is whole, of the fit that is there, and made as it would be made now."""
    try:
        if path.stat().st_mtime_ns < fit_path.stat().st_mtime_ns:
            return False
        payload = path.read_bytes()
        stored, record = Atlas.decode(payload), decode_tensors(payload)[1]
    except (OSError, ValueError):
        return False
    # Atlases from before this was kept were made with the default.
    transport = record.get("transport", Preset.transport)
    return (stored.layout_id, stored.spec, transport) == (layout.id, preset.channels, preset.transport)


def stats(preset: Preset, run: Path) -> None:
    """Mean and deviation of every cell over the shards, if wanted of its normal scores; of a bundle that is gone on from its own.

    And the covariance of what they normalise, where the network is to correct its estimate.
    """
    scores = None
    bundle = load_base(preset.finetune.base).bundle if preset.finetune.base and not preset.relearn else None
    if bundle:
        for sample, layout_id in dataset.read_shards(run / "shards"):
            if (layout_id, sample.spec) != (bundle.layout.id, bundle.channels):
                raise InputError(f"{sample.id} has another layout or other channels than {bundle.name}: make the atlases with its settings")
        bundle.normalization.save(run / "normalization.safetensors")
        if preset.finetune.prior:
            (bundle.prior or _prior_of(run, bundle.normalization)).save(run / _PRIOR)
        _say(f"stats: those of {bundle.name}, which is gone on from")
        return
    if preset.normal_scores:
        histograms = NormalScoresAccumulator(preset.channels)
        for sample, _ in dataset.read_shards(run / "shards"):
            histograms.update(sample.values)
        scores = histograms.result()
    accumulator = None
    for sample, layout_id in dataset.read_shards(run / "shards"):
        accumulator = accumulator or NormalizationAccumulator(layout_id, scores)
        accumulator.update(sample.values)
    if accumulator is None:
        raise InputError(f"no atlas in {run / 'shards'}: run `python -m trainer atlas` again")
    normalization = accumulator.result(preset.normalization)
    normalization.save(run / "normalization.safetensors")
    if preset.finetune.prior:
        _prior_of(run, normalization).save(run / _PRIOR)
    _say(f"stats: mean and deviation of {accumulator.count} atlases, for every {preset.normalization}")


def _prior_of(run: Path, normalization: Normalization) -> AtlasPrior:
    accumulator = PriorAccumulator(normalization.layout_id)
    for sample, _ in dataset.read_shards(run / "shards"):
        accumulator.update(normalization.normalize(sample.values)[None])
    return accumulator.result()


def finetune(preset: Preset, run: Path) -> None:
    """Train the network; goes on from the newest checkpoint. Under `accelerate launch` in several processes."""
    device = "auto" if torch.cuda.is_available() else "cpu"
    data = training_data(preset, run)
    trainer = Trainer(preset.finetune, data, run / "finetune", device, lambda trainer: _picture(preset, trainer))
    if trainer.resume() and trainer.accelerator.is_main_process:
        _say(f"finetune: resumed at step {trainer.step}")
    if trainer.accelerator.is_main_process:
        size = sum(parameter.numel() for parameter in trainer.unet.parameters())
        trained = sum(parameter.numel() for parameter in trainer.trainable.values())
        part = "" if trained == size else f", {trained / 1e6:.1f} M of them trained"
        _say(f"finetune: {size / 1e6:.1f} M parameters{part}, {len(trainer.train_rows)} atlases, {len(trainer.validation_rows)} held out")
    for _ in trainer.run():
        pass


def pretrain(preset: Preset, run: Path) -> None:
    """Train a small 2D base on the rendered views; `--finetune.base RUN/base` then starts from it."""
    from .pretrain import pretrain as train_base

    device = "auto" if torch.cuda.is_available() else "cpu"
    pictures = preset.pretrain_pictures, preset.pretrain_licence
    base = train_base(preset.pretrain, run / "views", preset.pretrain_size, run, device, preset.prompts[:8], *pictures)
    _say(f"pretrain: {base}")


def training_data(preset: Preset, run: Path) -> TrainingData:
    """The shards, normalised as they are read, with the text features of their captions."""
    layout = AtlasLayout.load_default(preset.size, preset.projection)
    return from_shards(run / "shards", _normalization(run), text_encoder_of(preset.finetune), layout, _prior(preset, run))


def text_encoder_of(config: FinetuneConfig) -> TextEncoder:
    """The text encoder that the settings ask for: their own, the base's, or MiniLM."""
    base = load_base(config.base) if config.base else None
    return text_encoder(config.text_encoder, base, config.unconditional)


@contextmanager
def averaged_pipeline(preset: Preset, trainer: Trainer) -> Iterator[GaussianAtlasPipeline]:
    """A pipeline of the network in training; for as long as the context lasts with its averaged weights."""
    from diffusers import DPMSolverMultistepScheduler

    from generator.model.pipeline import GaussianAtlasPipeline

    from .schedule import scheduler_config

    config, decoding, encoder = trainer.config, trainer.data.decoding, trainer.data.encoder
    assert decoding is not None and encoder is not None  # atlases from shards come with both
    solver = DPMSolverMultistepScheduler.from_config(scheduler_config(config.prediction_type, config.shift, config.zero_terminal_snr))
    info = {"fold": config.fold, "wrap": config.wrap, "low_pass": preset.views.low_pass, "distilled_guidance": config.distill_guidance}
    info |= _damping(preset)
    parts = (encoder, decoding.layout, decoding.normalization, decoding.channels, info)
    with trainer.averaged():
        yield GaussianAtlasPipeline(trainer.unet.eval(), solver, *parts, prior=trainer.prior)


def _picture(preset: Preset, trainer: Trainer) -> torch.Tensor:
    """What the averaged network makes of the preset's first prompts now: renders side by side, [H, W, 3]."""
    from generator.render import Cameras, render

    with averaged_pipeline(preset, trainer) as pipeline:
        made = pipeline(list(preset.prompts[:4]), num_inference_steps=preset.steps, guidance_scale=preset.guidance_scale).gaussians
    return torch.cat([render(gaussians, Cameras.orbit(1, 192)).rgb[0] for gaussians in made], dim=1)


def pack(preset: Preset, run: Path) -> None:
    """Write the bundle of the newest checkpoint's averaged network."""
    from generator.model.bundle import save_bundle

    from .finetune import check_settings, trained_unet
    from .schedule import scheduler_config

    found = checkpoints(run / "finetune")
    if not found:
        raise InputError(f"no checkpoint in {run / 'finetune'}: run `python -m trainer finetune` first")
    encoder = text_encoder_of(preset.finetune)
    normalization, layout = _normalization(run), AtlasLayout.load_default(preset.size, preset.projection)
    everything = [sample for sample, _ in dataset.read_shards(run / "shards")]
    samples = [sample for sample in everything if sample.id == sample.record["object"]]
    _check_credits(samples, run)
    prior, regression = _prior(preset, run), None
    known = statistics_of(layout, normalization, samples[0].spec, prior)
    state = check_settings(found[-1], preset.finetune, known)
    step = state["step"]
    unet = trained_unet(preset.finetune, found[-1], encoder.width, statistics=known)
    psnrs = [sample.record["psnr"] for sample in samples if sample.record.get("psnr") is not None]
    libraries = sorted({(sample.record["library"], sample.record["licence"]) for sample in samples})
    config = preset.finetune
    base = _base_record(config)
    licences = {licence for _, licence in libraries} | (set(base["licence"].split(" AND ")) if isinstance(base, dict) else set())
    licences = {licence for licence in licences if not licence.startswith("CC0")}
    info = {
        "name": f"gaussian-atlas-{preset.name}",
        "version": preset.version,
        "licence": " AND ".join(sorted(licences)) or "CC0-1.0",
        "trained_on": {
            "objects": len(samples),
            "atlases": len(everything),
            "libraries": [f"{library} ({licence})" for library, licence in libraries],
            "base": base,
            "steps": step,
            "batch_size": state["config"]["batch_size"],
            "prediction_type": config.prediction_type,
        },
        "vocabulary": sorted({sample.record["captions"][0] for sample in samples}),
        "metrics": {"fit_psnr_mean": round(sum(psnrs) / len(psnrs), 2), "fit_psnr_lowest": round(min(psnrs), 2)} if psnrs else {},
        "fold": config.fold,
        "wrap": config.wrap,
        # Imported fits were not made through the low-pass of our views.
        "low_pass": round(preset.views.low_pass, 6) if psnrs else 0.0,
        "coverage": round(_coverage(samples, layout), 3),
        "defaults": {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance_scale},
        "inference": {"dtype": "auto"},
    }
    info |= _damping(preset)
    if preset.regression:
        assert prior is not None  # or the preset would have been refused
        regression = regression_of(dataset.read_shards(run / "shards"), normalization, prior, encoder)
        info["regression"] = {name: getattr(preset, f"regression_{name}") for name in REGRESSION_SHARES}
    if config.distill_guidance:
        info["distilled_guidance"] = config.distill_guidance
    save_bundle(
        run / "bundle",
        unet=unet,
        scheduler_config=scheduler_config(config.prediction_type, config.shift, config.zero_terminal_snr),
        text_encoder=encoder,
        layout=layout,
        normalization=normalization,
        channels=samples[0].spec,
        info=info,
        files={"CREDITS.md": _credits(samples).encode()},
        prior=prior,
        regression=regression,
    )
    _say(f"pack: {run / 'bundle'}, step {step}, {len(samples)} objects")


def regression_of(
    samples: Iterable[tuple[dataset.Sample, str]], normalization: Normalization, prior: AtlasPrior, encoder: TextEncoder
) -> TextRegression:
    """Atlases by the plainest caption of each that names its object as a prompt would: "a red chair"."""
    builder = RegressionBuilder(variances_of(prior.covariance), prior.layout_id)
    for sample, _ in samples:
        told = sample.record["captions"]
        plain = [caption for caption in told if re.match(r"an? (?!3d model)", caption) and " for the " not in caption]
        builder.add(normalization.normalize(sample.values), min(plain or told, key=len), sample.record["object"])
    return builder.result(encoder.sentences)


def _coverage(samples: list[dataset.Sample], layout: AtlasLayout, most: int = 100) -> float:
    """How far the splats of some training objects reach towards their neighbours: the median over objects."""
    chosen = samples[:: max(1, len(samples) // most)]
    return statistics.median(coverage(from_atlas(Atlas(sample.values, layout.id, sample.spec), layout)) for sample in chosen)


def _base_record(config: FinetuneConfig) -> dict | str:
    """What a bundle says of the model that it was made from."""
    if not config.base:
        return "none: random weights"
    base = load_base(config.base)
    licence = config.base_licence or base.licence
    if not licence:
        raise InputError(f"the card of base {config.base!r} names no licence: say it with --finetune.base-licence")
    # A folder of this machine means nothing to others: its name is enough beside the hash.
    name = config.base if not Path(config.base).exists() else Path(config.base).name
    record = {"name": name, "sha256": base.sha256, "licence": licence, "prediction_type": base.prediction_type}
    if base.bundle is not None:
        # And what it was made from in turn: no link of the chain is lost.
        record |= {"name": base.bundle.name, "trained_on": base.bundle.info["trained_on"]}
    return record


def evaluate(preset: Preset, run: Path) -> None:
    """Score the bundle on the preset's few prompts; `python -m trainer evaluate` does so on many."""
    from .evaluate import Protocol, own_prompts, summary_line
    from .evaluate import evaluate as evaluate_bundle

    prompts = own_prompts(preset.prompts)
    report = evaluate_bundle(run / "bundle", run / "evaluation", prompts, run / "shards", Protocol(views=_EVALUATION_VIEWS))
    _say(f"evaluate: {summary_line(report)}; see {run / 'evaluation' / 'report.html'}")


STAGES: dict[str, Callable[[Preset, Path], None]] = {
    "views": views,
    "fit": fit,
    "atlas": atlas,
    "stats": stats,
    "finetune": finetune,
    "pack": pack,
    "evaluate": evaluate,
}


def _check_credits(samples: list[dataset.Sample], run: Path) -> None:
    if not samples:
        raise InputError(f"{run / 'shards'} holds copies of objects alone: run `python -m trainer atlas` again")
    for sample in samples:
        missing = [key for key in ("name", "creator", "licence", "library") if not isinstance(sample.record.get(key), str)]
        if missing:
            raise InputError(f"{run / 'shards'}: {sample.id} has no {missing[0]}, which the credits need: make its record and atlas again")


def _credits(samples: list[dataset.Sample]) -> str:
    """Whom to thank for the objects a model was trained on: a table of libraries, then every object."""
    known = []
    for sample in samples:
        credit = {key: sample.record[key] for key in ("name", "creator", "licence", "library")}
        known.append(SourceObject(id=sample.id, path=Path(), **credit))
    return "# Objects this model was trained on\n\n" + credits(known) + "\n" + "\n".join(credit_lines(known)) + "\n"


def _normalization(run: Path) -> Normalization:
    path = run / "normalization.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is not there: run `python -m trainer stats` first")
    return Normalization.load(path)


def _prior(preset: Preset, run: Path) -> AtlasPrior | None:
    path = run / _PRIOR
    if not preset.finetune.prior:
        return None
    if not path.is_file():
        raise InputError(f"{path} is not there: run `python -m trainer stats` first")
    return AtlasPrior.load(path)


def _damping(preset: Preset) -> dict:
    damped = preset.finetune.prior and min(preset.damping_variance, preset.damping_noise) < 1
    values = {"above": preset.damping_above, "variance": preset.damping_variance, "noise": preset.damping_noise}
    return {"damping": values} if damped else {}


def _finished(directory: Path, suffix: str, stage: str) -> list[Path]:
    found = sorted(path for path in directory.glob(f"*{suffix}") if not path.name.startswith("."))
    if not found:
        raise InputError(f"nothing in {directory}: run `python -m trainer {stage}` first")
    return found


def _selected(stage: str, run: Path, directory: Path, suffix: str, needs: str) -> list[Path]:
    """Files of `_finished` without those of objects that the last `views` or `farm` did not choose: exclude, limit or licences changed."""
    from .views import deselected

    found, left_out = _finished(directory, suffix, needs), deselected(run / "views")
    chosen = [path for path in found if path.stem not in left_out]
    _say_left_out(stage, len(found) - len(chosen))
    if not chosen:
        raise InputError(f"nothing in {directory} is of objects that are chosen now: run `python -m trainer {needs}` first")
    return chosen


def _say_left_out(stage: str, count: int) -> None:
    if count:
        _say(f"{stage}: {count} objects of earlier runs are left out, since they are not chosen any more")


def _report(stage: str, total: int, failures: dict[str, str], done: int) -> None:
    _say(f"{stage}: {done} of {total} objects")
    for identifier, reason in failures.items():
        _say(f"  {identifier}: {reason}")
    if not done:
        raise WorkError(f"{stage} failed for every object; the first says: {next(iter(failures.values()), 'nothing')}")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)
