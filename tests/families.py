"""Generates the tables of model families in README files from the registry. `python tests/families.py` updates them.

Values come from pipelines, sampling parameters and pipeline configs; only `title` and `deviations` are prose.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from bare_checkpoint import safetensors_bytes
from common.checkpoint import Checkpoint
from common.pipeline import ComposedPipeline, ServiceSpec
from configs.pipeline_configs.base import DecodingConfig, DenoisingConfig, ImageLatentsConfig, PipelineConfig
from configs.sample.base import SamplingParams
from generated_part import GeneratedPart, markdown
from models.registry import PipelineEntry, Registry, load_registry, resolve
from readme import ROOT

PART = GeneratedPart(
    ROOT / "README.md", "<!-- families: `poe families` writes this table -->\n", "<!-- end of families -->\n"
)
DETAILS = GeneratedPart(
    ROOT / "models" / "README.md",
    "<!-- family details: `poe families` writes this table -->\n",
    "<!-- end of family details -->\n",
)

_HEADINGS = ("Family", "Class", "Style", "Inputs", "Outputs")
_DETAILS_HEADINGS = ("Family", "Variants", "Parallel", "Resume", "Differs from Diffusers")
_CHOICES: tuple[Mapping[str, object], ...] = ({}, {"expand_timesteps": True}, {"boundary_ratio": 0.9})
"""Entries of model_index.json that choose the variants of a pipeline."""
_TRANSFORMERS: tuple[Mapping[str, object], ...] = (
    {"pos_embed_seq_len": None},
    {"pos_embed_seq_len": 514},
)
"""Transformer config entries that choose the input images of a request."""
_PER_LAYER = {"RGB": "PNG per layer", "RGBA": "PNG with alpha per layer"}


@dataclass(frozen=True)
class Served:
    """A registered variant: its pipeline, its configs, and the checkpoints that are served with it."""

    name: str
    variant: str
    pipeline: type[ComposedPipeline]
    params: type[SamplingParams]
    config: type[PipelineConfig]
    checkpoints: tuple[Checkpoint, ...]

    @property
    def services(self) -> tuple[ServiceSpec, ...]:
        """Services of a checkpoint that has all required modules."""
        return self.pipeline(self.pipeline._required_config_modules).services

    def style(self) -> str:
        """ "hybrid" if a stage is model-specific, else "modular"."""
        stages = [stage.implementation for service in self.services for stage in service.stages]
        return "hybrid" if any(".model_specific_stages." in each for each in stages) else "modular"

    def inputs(self) -> str:
        """Inputs: text, and the roles of images."""
        roles = [self.params.image_roles(each) for each in self.checkpoints]
        always = set.intersection(*(set(each.required) for each in roles))
        optional = dict.fromkeys(role for each in roles for role in each.optional)
        others = dict.fromkeys(role for each in roles for role in each.required if role not in {*always, *optional})
        required = dict.fromkeys(role for each in roles for role in each.required if role in always)
        images = [*(f"`{role}`" for role in required), *(f"`{role}` for some models" for role in others)]
        return ", ".join(["text", *images, *_optional(list(optional))])

    def outputs(self) -> str:
        """Result formats, the default first."""
        first, *others = self.params.output_formats
        shown = first.upper()
        if "layers" in {each.name for each in fields(self.params)} and issubclass(self.config, ImageLatentsConfig):
            shown = _PER_LAYER[self.config.image_mode]
        if issubclass(self.config, DecodingConfig) and self.config.audio_part is not None:
            shown += " with audio"
        return ", ".join([shown, *others])

    def parallel(self) -> str:
        """Mesh axes that a worker group of this model may use."""
        axes = list(self.config.parallel_axes) if self.config.parallel_modules else []
        if axes and issubclass(self.config, DenoisingConfig) and len(self.config.branches) > 1:
            axes.append("cfg")
        return ", ".join(axes) or "no"

    def resume(self) -> str:
        """Steps after which the loop can resume on another worker: "each step" or "no"."""
        loops = [stage for service in self.services for stage in service.stages if stage.reports_steps]
        return "each step" if loops and all(stage.resume_slot is not None for stage in loops) else "no"


def _optional(roles: list[str]) -> Iterator[str]:
    """Format optional image roles; a numbered series as its first and last role."""
    if len(roles) > 2:
        yield f"optional `{roles[0]}` to `{roles[-1]}`"
    else:
        yield from (f"optional `{role}`" for role in roles)


def _checkpoints(folder: Path, name: str) -> list[Checkpoint]:
    """Checkpoint directories with this `_class_name`, one per pair of _CHOICES and _TRANSFORMERS."""
    made = []
    for index, choice in enumerate(_CHOICES):
        for number, transformer in enumerate(_TRANSFORMERS):
            path = folder / f"{name}-{index}-{number}"
            module = path / "transformer"
            module.mkdir(parents=True)
            (module / "config.json").write_text(json.dumps(transformer))
            (module / "diffusion_pytorch_model.safetensors").write_bytes(safetensors_bytes({"weight": [0.0]}))
            entries = {"_class_name": name, "transformer": ["diffusers", "Transformer"], **choice}
            (path / "model_index.json").write_text(json.dumps(entries))
            made.append(Checkpoint.open(path))
    return made


def _served(entry: PipelineEntry, checkpoints: Iterable[Checkpoint]) -> Iterator[Served]:
    """The variants of a registry entry. Raises LookupError if a variant is selected by no checkpoint."""
    name = entry.pipeline.pipeline_name
    found = [(each, entry.pipeline.variants(each)) for each in checkpoints]
    for variant, configs in entry.configs.items():
        with_it = [(each, classes[variant]) for each, classes in found if variant in classes]
        if not with_it:
            raise LookupError(
                f"variant: {variant!r} of {name} is not selected by a checkpoint; an entry of _CHOICES works"
            )
        pipeline = with_it[0][1]
        params, config = resolve(configs.sampling_params), resolve(configs.pipeline_config)
        yield Served(name, variant, pipeline, params, config, tuple(each for each, _ in with_it))


def all_served(registry: Registry) -> list[Served]:
    """Every registered variant, sorted by pipeline name. Raises LookupError if a variant has no checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        entries = [registry.entry(name) for name in registry.names()]
        return [
            each
            for entry in entries
            for each in _served(entry, _checkpoints(Path(folder), entry.pipeline.pipeline_name))
        ]


@dataclass(frozen=True)
class Family:
    """Cells of the tables for the variants with one title; `resume` is as in Served.resume()."""

    title: str
    classes: str
    variants: str
    style: str
    inputs: str
    outputs: str
    parallel: str
    resume: str
    deviations: str


def _family(title: str, members: list[Served]) -> Family:
    """The family of the variants with one title. Raises ValueError if they differ where the tables have one value."""
    once = {
        "style": {each.style() for each in members},
        "outputs": {each.outputs() for each in members},
        "parallel axes": {each.parallel() for each in members},
        "resume": {each.resume() for each in members},
        "deviations": {each.config.deviations for each in members},
    }
    for fact, values in once.items():
        if len(values) > 1:
            raise ValueError(f"title: {title!r} is shared by configs that differ in {fact}; separate titles work")
    style, outputs, parallel, resume, deviations = (values.pop() for values in once.values())
    variants = ", ".join(dict.fromkeys(f"`{each.variant}`" for each in members if each.variant))
    inputs = dict.fromkeys(each.inputs() for each in sorted(members, key=lambda each: len(each.inputs())))
    return Family(
        title=title,
        classes=", ".join(dict.fromkeys(f"`{each.name}`" for each in members)),
        variants=variants or "one",
        style=style,
        inputs="; or ".join(inputs),
        outputs=outputs,
        parallel=parallel,
        resume=resume,
        deviations=deviations or "nothing",
    )


def all_families(registry: Registry) -> list[Family]:
    """Every family, sorted by title. Raises ValueError for a config without a title."""
    families: dict[str, list[Served]] = {}
    for each in all_served(registry):
        if not each.config.title:
            raise ValueError(f"title: {each.config.__name__} has no title; a non-empty title works")
        families.setdefault(each.config.title, []).append(each)
    return [_family(title, families[title]) for title in sorted(families, key=str.casefold)]


def table(families: Iterable[Family]) -> str:
    """The Markdown table of the root README."""
    rows = [(each.title, each.classes, each.style, each.inputs, each.outputs) for each in families]
    return markdown((_HEADINGS, ("---",) * len(_HEADINGS), *rows))


def details(families: Iterable[Family]) -> str:
    """The Markdown table of models/README.md."""
    rows = [(each.title, each.variants, each.parallel, each.resume, each.deviations) for each in families]
    return markdown((_DETAILS_HEADINGS, ("---",) * len(_DETAILS_HEADINGS), *rows))


if __name__ == "__main__":
    FAMILIES = all_families(load_registry())
    PART.write(table(FAMILIES))
    DETAILS.write(details(FAMILIES))
