"""App files in YAML: llmrun's own form, `models:` with what `@llm` takes, and Ray Serve LLM's (`rayllm`)."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmrun.decorator import llm, spec_of
from llmrun.errors import AppError, SpecError
from llmrun.spec import ModelSpec, to_label
from llmrun.weights import Weights
from llmrun_cli.app_files.ray_serve_llm import Reader, is_rays

SUFFIXES = (".yaml", ".yml")
FORM = """\
    models:
      - model: Qwen/Qwen2.5-0.5B-Instruct
        name: assistant"""
# What a class brings with it in Python.
OF_CLASSES = ("requirements",)


class _Strict(yaml.SafeLoader):
    """YAML in which no key stands twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises yaml.YAMLError."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[list[ModelSpec], list[str]]:
    """The models of a file, and what was left out of it and why. Raises AppError."""
    content = _parse(path)
    if not isinstance(content, Mapping):
        raise AppError(f"{path} has no model: write\n\n{FORM}")
    if is_rays(content):
        reader = Reader(path, _parse)
        found = reader.read(content)
        return _built(found, path), reader.warnings
    for name in content:
        if name != "models":
            raise AppError(f"{path}: {name}: a file has `models:` and nothing else (or is one of Ray Serve LLM's)")
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise AppError(f"{path} has no model: write\n\n{FORM}")
    return _built(models, path), []


def _parse(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(), _Strict)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise AppError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise AppError(f"{path}: it cannot be read ({str(error).splitlines()[0]})") from None


def _built(models: list[Any], path: Path) -> list[ModelSpec]:
    found: dict[str, ModelSpec] = {}
    for number, fields in enumerate(models):
        place = f"{path}: models[{number}]"
        if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
            raise AppError(f"{place}: names and values, like\n\n{FORM}")
        for name in OF_CLASSES:
            if name in fields:
                raise AppError(f"{place}: {name}: it goes with a class's own code: write the model in a .py file")
        said = {"name": to_label(_base(fields.get("model"))), **fields}
        try:
            if isinstance(fields.get("model"), Mapping):
                said["model"] = Weights(**fields["model"])
            spec = spec_of(llm(**said)(type("Model", (), {})))
        except (SpecError, TypeError) as error:  # an option of Weights that there is not
            raise AppError(f"{place}: {error}") from None
        assert spec
        if spec.name in found:
            raise AppError(f"{place}: there are two models named {spec.name!r}: give one of them another name")
        found[spec.name] = spec
    return list(found.values())


def _base(model: Any) -> str:
    """What a model is called if nobody says it."""
    source = model.get("source", "") if isinstance(model, Mapping) else model
    return str(source or "").rstrip("/").rpartition("/")[2].partition("@")[0]


def schema() -> dict[str, Any]:
    """The JSON schema of llmrun's own form, for editors."""
    said = ModelSpec.model_json_schema()
    fields, definitions = said["properties"], said["$defs"]
    for name in ("code", *OF_CLASSES):
        del fields[name]
    strings = {"type": "array", "items": {"type": "string"}}
    # What may be written beside what a spec holds.
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
    texts = _texts()
    for name, value in fields.items():
        value.pop("title", None)
        value["description"] = texts.get(name, "")
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


def _texts() -> dict[str, str]:
    """What `llm`'s docstring says of each argument."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(llm.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found
