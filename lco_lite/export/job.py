"""What is exported, of which run, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lco_lite.console import Console
from lco_lite.data.prompts import recipe_task, system_text
from lco_lite.files import read_json
from lco_lite.models.chat import PLAIN_TEMPLATE, ChatFormat
from lco_lite.models.loading import load_tokenizer
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Weights
from lco_lite.run import Run, StageFolder
from lco_lite.weights import policy_id


@dataclass
class Export:
    """``base``: the settings of the weights that the stage's adapter belongs on, which lie in ``folder``, or where the
    settings say; of a stage that trained all weights ``folder`` has these."""

    run: Run
    recipe: Recipe
    stage: StageFolder
    policy: str  # the stage, or its best step
    form: str
    dtype: str
    out: Path
    base: Weights
    folder: Path | None
    converter: Path | None
    console: Console

    @property
    def whole(self) -> bool:
        """Whether the stage trained all weights."""
        return not self.files.adapter.exists()

    @property
    def files(self) -> StageFolder:
        """Where adapter or model lie."""
        return StageFolder(self.stage.best) if self.policy != self.stage.name else self.stage

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.policy.replace('@', '-')}"

    @property
    def is_local(self) -> bool:
        """Whether others do not have the base."""
        path = self.base.path
        return path is None or self.base.gguf_file is not None or Path(path).is_dir()

    @property
    def base_path(self) -> str:
        return str(self.folder or self.base.path)

    @property
    def system(self) -> str | None:
        """The system message that the model was trained with."""
        return system_text(self.recipe, recipe_task(self.recipe))

    @cached_property
    def tokenizer(self) -> Any:
        """With a template in any case: where the model has none, that of the plain format."""
        tokenizer = load_tokenizer(self.base, self.folder)
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
        return tokenizer

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, self.recipe.chat.template_args, self.console.warn)

    def made_from(self) -> dict[str, str]:
        """What tells one export from another."""
        return {"form": self.form, "policy": self.policy, "id": policy_id(self.run, self.policy), "dtype": self.dtype}


class AdapterKept(BaseModel):
    """``adapter_config.json``, as far as it is read here."""

    r: int


def adapter_config(folder: Path) -> dict[str, Any]:
    """DataError where it is damaged."""
    return dict(read_json(folder / "adapter_config.json", AdapterKept, "Put it back as it was"))
