"""What must not leave the machine with an adapter: local paths and access tokens, replaced by neutral words.

Two strengths. `neutral_text` is for prose that somebody wrote: it takes out what is certainly a path or a key.
`neutral` is for the values of a recipe or a report, where the key beside a value tells more, and too much is better
than too little: a value that could be a path goes whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported by name

__all__ = ["LocalNames", "has_secret", "hub_id", "is_local", "is_pocket_folder", "neutral", "neutral_text"]

SECRET, PATH = "removed-secret", "local-path"

#: Words that follow `hf_` in names of libraries and functions, not in tokens.
_HF_WORDS = "hub transfer transformers xet token home api endpoint model dataset config datasets argparser".split()
_SECRETS = re.compile(
    rf"""(?x)
      (?<![A-Za-z0-9]) hf_ (?!(?:{"|".join(_HF_WORDS)})(?![A-Za-z0-9])) [A-Za-z0-9]{{6,}}
    | (?<![A-Za-z0-9]) (?: api_org_ | sk-(?:[a-z]+-)* | gh[pousr]_ | github_pat_ | glpat- | npm_ | pypi- | wandb_v1_
        | xox[a-z]- | AIza | AKIA | ASIA ) [\w-]{{12,}}
    | eyJ[\w-]{{8,}} \. [\w-]{{8,}} (?: \. [\w-]+ )?
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY----- .*? (?: -----END\ [A-Z ]*----- | \Z )
    | (?i: \b bearer ) \s+ [\w.~+/=-]{{8,}}
    | (?<=://) [^/\s:@]* : [^/\s@]+ (?=@)
    | (?P<kept> (?i: (?<![A-Za-z0-9]) [\w-]*? (?: api[_-]?key | secret(?:[_-]key)? | passw(?:or)?d | access[_-]key
        | (?:hub|auth|access)[_-]token ) )
        ["']? \s* [=:] \s* ) (?!removed-secret) [^\s,;]+
    | \b (?=[A-Za-z0-9]*[a-z]) (?=[A-Za-z0-9]*[A-Z]) (?=[A-Za-z0-9]*[0-9]) [A-Za-z0-9]{{30,}} \b
    """,
    re.DOTALL,
)
_ROOTS = (
    "home Users root tmp var mnt media data opt srv workspace content kaggle scratch private Volumes work lustre gpfs "
    "nfs efs fsx dbfs user users export projects"
).split()
_START = rf"""(?x:
      (?: file | s3a? | gs | gcs | az | abfss? | wasbs? | hdfs | dbfs ) : //?
    | (?<![A-Za-z0-9]) [A-Za-z] : (?: \\ | / (?!/) ) (?: Users [\\/] \w+ (?: \ \w+ ){{1,2}} (?=[\\/]) )?
    | \\\\ [\w.$-]+ \\
    | (?<![\w./\\~<-]) (?: ~ [\w.-]* | \$ \{{? \w+ \}}? | % \w+ % ) [/\\]
    | (?<![\w./\\~<-]) / (?: (?: {"|".join(_ROOTS)} ) (?![\w.-]) (?: (?<=home|sers) / \w+ (?: \ \w+ ){{1,2}} / )?
        | (?! v\d/ | api/ | docs/ ) [^\s/'"`<>|,;()\[\]{{}}]+ / )
    )"""
_QUOTED = re.compile(rf"(?P<quote>['\"`]){_START}(?:(?!(?P=quote))[^\n])*(?P=quote)")
_UNTIL_SPACE = re.compile(rf"{_START}[^\s'\"`<>|,;()\[\]{{}}]*")
_UNTIL_LINE_END = re.compile(rf"(?:{_START}|(?<![\w.])\.{{1,2}}[/\\])[^\n]*")
_WHOLE = re.compile(rf"{_START}|[/~]|\.{{1,2}}(?:[/\\]|\Z)|[^\s\\]+\\[^\s\\]+\\")
_FILE = re.compile(
    r"(?i).*\.(?:jsonl?|csv|tsv|parquet|arrow|txt|ya?ml|toml|jinja|md|py|ipynb|safetensors|bin|pt|pth|ckpt|gguf|gz|zip|zst)"
)
_SECRET_KEY = re.compile(r"(?i)(?:.*_)?(?:token|secret|password|passwd|api_?key|access_key|private_key|credentials?)")
_TOKENIZER_KEY = re.compile(r"(?:eos|bos|pad|unk|sep|cls|mask)_token")
_PATH_KEY = re.compile(r"(?i)(?:.*_)?(?:dir|path|file|folder|resume_from_checkpoint|deepspeed|fsdp_config)")
#: Names or regular expressions of a model's modules: full of dots and backslashes, never paths.
_MODULE_KEYS = frozenset(
    "target_modules exclude_modules modules_to_save layers_pattern target_parameters rank_pattern alpha_pattern "
    "fsdp_transformer_layer_cls_to_wrap".split()
)


def has_secret(text: str) -> bool:
    """Whether `text` holds what looks like an access token or key."""
    return _SECRETS.search(text) is not None


def neutral_text(text: str) -> str:
    """`text` without access tokens, keys and absolute local paths (home folders, drives, shares, storage buckets)."""
    text = _without_secrets(text)
    text = _QUOTED.sub(lambda found: f"{found['quote']}{PATH}{found['quote']}", text)
    return _UNTIL_SPACE.sub(PATH, text)


def is_local(text: str) -> bool:
    """Whether `text` as a whole can only be meant as a file or folder of some machine."""
    text = text.strip().strip("'\"")
    if _WHOLE.match(text):
        return True
    return " " not in text and (_FILE.fullmatch(text) is not None or (text.count("/") > 1 and "://" not in text))


def is_pocket_folder(name: Any) -> bool:
    """Whether `name` is the folder of the embedded model, on whatever machine."""
    return isinstance(name, str) and Path(name).parts[-3:] == ("llmreg", "pocket", "model")


def hub_id(name: Any) -> str | None:
    """`name` if it is the id of a Hub repository, else None; a folder of that name here wins, as in transformers."""
    if not isinstance(name, str) or is_local(name) or has_secret(name) or _exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def neutral(value: Any, key: str = "") -> Any:
    """A copy of plain values (mappings, lists, text, numbers) without local paths and secrets.

    Args:
        value: to copy. key: what it stands under.
    """
    if isinstance(value, Mapping):
        if key in _MODULE_KEYS:
            return {_without_secrets(str(name)): neutral(item, key) for name, item in value.items()}
        return {_value_text(str(name)): neutral(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [neutral(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.fullmatch(key) and not _TOKENIZER_KEY.fullmatch(key):
        return SECRET
    if key in _MODULE_KEYS:
        return _without_secrets(value)
    return PATH if _PATH_KEY.fullmatch(key) or is_local(value) else _value_text(value)


def _without_secrets(text: str) -> str:
    return _SECRETS.sub(lambda found: (found["kept"] or "") + SECRET, text)


def _value_text(text: str) -> str:
    return _UNTIL_LINE_END.sub(PATH, _without_secrets(text))


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


class LocalNames:
    """Neutral names for local data, the same for the same source wherever it appears in a recipe and its report."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def data(self, name: Any) -> Any:
        """A pocket task or a Hub id as it is; `local-data`, `local-data-2`, ... for everything else."""
        if not isinstance(name, str):
            return neutral(name)
        if re.fullmatch(r"pocket/[\w-]+", name) or hub_id(name):
            return name
        count = len(self._given) + 1
        return self._given.setdefault(name, "local-data" if count == 1 else f"local-data-{count}")

    def model(self, name: Any) -> str:
        """A Hub id (or `pocket`) as it is, else `local-model`."""
        return hub_id(name) or "local-model" if name != "pocket" else "pocket"

    def recipe(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe in which models, data and folders of this machine have neutral names."""
        values = neutral(recipe)
        for section, keys in (
            ("data", ("train", "test")),
            ("evaluation", ("tasks", "forgetting")),
            ("calibration", ("data",)),
        ):
            given = _section(recipe, section)
            for key in keys:
                name = given.get(key)
                if isinstance(name, list | tuple):
                    values[section][key] = [self.data(one) for one in name]
                elif name is not None:
                    values[section][key] = self.data(name)
        if "name" in _section(recipe, "model"):
            values["model"]["name"] = self.model(recipe["model"]["name"])
        if "dir" in _section(recipe, "output"):
            values["output"]["dir"] = "output"
        return values

    def report(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a report that holds on any machine: what was trained and measured, no times, no places."""
        values = neutral({key: report[key] for key in _REPORTED if key in report})
        if "model" in report:
            values["model"] = self.model(report["model"])
        rows = report.get("measurements") or ()
        values["measurements"] = [{**neutral(row), "name": self.data(row.get("name"))} for row in rows]
        export = report.get("export")
        if isinstance(export, Mapping):
            values["export"] = {
                key: neutral(export[key]) for key in ("rank", "dtype", "relative_error") if key in export
            }
        return values


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, Mapping) else {}


_REPORTED = (
    "classes method model seed measurements heldout_loss steps train_loss losses trainable_parameters total_parameters "
    "adapter_bytes rank start_hash export versions"
).split()
