"""App files in YAML: llmrun's own (`models:` with the arguments of `@llm`) and Ray Serve LLM's (`ray_serve_llm`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmrun.decorator import llm, spec_of
from llmrun.docstrings import argument_docstrings
from llmrun.errors import AppError, SpecError
from llmrun.spec import ModelSpec, to_label
from llmrun.weights import Weights
from llmrun_cli.app_files.ray_serve_llm import RayConfigReader, is_ray_config

SUFFIXES = (".yaml", ".yml")
EXAMPLE = """\
    models:
      - model: Qwen/Qwen2.5-0.5B-Instruct
        name: assistant"""
# Spec fields that only make sense with a class's own code.
CLASS_FIELDS = ("requirements",)


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises yaml.YAMLError."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicate = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if duplicate is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicate!r}", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[list[ModelSpec], list[str]]:
    """Return a file's models, and warnings about fields that were ignored. Raises AppError."""
    content = _parse(path)
    if not isinstance(content, Mapping):
        raise _no_models(path)
    if is_ray_config(content):
        reader = RayConfigReader(path, _parse)
        return _build_specs(reader.read(content), path), reader.warnings
    for name in content:
        if name != "models":
            raise AppError(f"{path}: unknown key {name!r}; must be `models:` (or those of a Ray Serve config)")
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise _no_models(path)
    return _build_specs(models, path), []


def _no_models(path: Path) -> AppError:
    return AppError(f"{path}: no models found. Write:\n\n{EXAMPLE}")


def _parse(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(), _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise AppError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise AppError(f"{path}: cannot read the file: {reason}") from None


def _build_specs(models: list[Any], path: Path) -> list[ModelSpec]:
    specs: dict[str, ModelSpec] = {}
    for number, fields in enumerate(models):
        where = f"{path}: models[{number}]"
        if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
            raise AppError(f"{where}: must be a mapping, for example:\n\n{EXAMPLE}")
        for name in CLASS_FIELDS:
            if name in fields:
                raise AppError(f"{where}: {name} is only supported in a .py file, for a class's own code")
        arguments = {"name": to_label(_default_name(fields.get("model"))), **fields}
        try:
            if isinstance(fields.get("model"), Mapping):
                arguments["model"] = Weights(**fields["model"])
            spec = spec_of(llm(**arguments)(type("Model", (), {})))
        except (SpecError, TypeError) as error:  # TypeError: an unknown option of Weights
            raise AppError(f"{where}: {error}") from None
        assert spec
        if spec.name in specs:
            raise AppError(f"{where}: duplicate model name {spec.name!r}. Set `name` on one of them.")
        specs[spec.name] = spec
    return list(specs.values())


def _default_name(model: Any) -> str:
    """Return the last part of the model's source, without its revision."""
    source = model.get("source", "") if isinstance(model, Mapping) else model
    return str(source or "").rstrip("/").rpartition("/")[2].partition("@")[0]


def schema() -> dict[str, Any]:
    """Return the JSON schema of llmrun's own YAML files, for editors."""
    spec_schema = ModelSpec.model_json_schema()
    fields, definitions = spec_schema["properties"], spec_schema["$defs"]
    for name in ("code", *CLASS_FIELDS):
        del fields[name]
    strings = {"type": "array", "items": {"type": "string"}}
    # `@llm` accepts more forms than the spec stores.
    source: dict[str, Any] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Weights"}]}
    fields["model"] = source
    definitions["LoRA"]["properties"]["path"] = source
    definitions["LoRA"]["properties"]["adapters"] = {"type": "object", "additionalProperties": source}
    fields["lora"] = {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/LoRA"}, {"type": "object", "additionalProperties": source}]
    }
    fields["accelerator"] = {"anyOf": [{"type": "string"}, strings]}
    fields["schedule"] = {"anyOf": [{"type": "string"}, strings]}
    fields["engine_args"] = {"anyOf": [{"type": "object"}, {"type": "string"}, strings]}
    for name in ("Accelerator", "Code"):
        definitions.pop(name, None)
    descriptions = argument_docstrings(llm)
    for name, value in fields.items():
        value.pop("title", None)
        value["description"] = descriptions.get(name, "")
    model = {"type": "object", "properties": fields, "required": ["model"], "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmrun app",
        "type": "object",
        "properties": {"models": {"type": "array", "minItems": 1, "items": model}},
        "required": ["models"],
        "additionalProperties": False,
        "$defs": definitions,
    }
